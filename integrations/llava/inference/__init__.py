"""Answers: a model asked about images, one question at a time or a file of them."""

from __future__ import annotations

from .answering import answer_into, open_answers
from .batching import Shard, answer_batches, find_shard, form_batches
from .predictor import Answerer, default_dtype, load_answerer, usable_device
from .prompt_builder import load_preparer
from .requests import Request, read_requests
from .results import AnswerFile
from .sampling import Decoding

__all__ = [
    "AnswerFile",
    "Answerer",
    "Decoding",
    "Request",
    "Shard",
    "answer_batches",
    "answer_into",
    "default_dtype",
    "find_shard",
    "form_batches",
    "load_answerer",
    "load_preparer",
    "open_answers",
    "read_requests",
    "usable_device",
]
