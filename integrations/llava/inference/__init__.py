"""Answers: a model asked about images, one question at a time or a file of them."""

from __future__ import annotations

from .answering import answer_into, open_answers
from .batching import Shard, answer_batches, find_shard, form_batches
from .predictor import Predictor, default_dtype, load_predictor, usable_device
from .prompt_builder import load_preparer
from .requests import Request, read_requests
from .results import AnswerFile
from .sampling import SamplingParams

__all__ = [
    "AnswerFile",
    "Predictor",
    "Request",
    "SamplingParams",
    "Shard",
    "answer_batches",
    "answer_into",
    "default_dtype",
    "find_shard",
    "form_batches",
    "load_predictor",
    "load_preparer",
    "open_answers",
    "read_requests",
    "usable_device",
]
