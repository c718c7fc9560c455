"""Answers: a model asked about images, one question at a time, in a conversation, or a file of them."""

from __future__ import annotations

from .batching import Shard, answer_all, find_shard
from .conversation import Conversation
from .likelihood import answer_likelihoods
from .predictor import Predictor, load_predictor
from .prompt_builder import load_preparer
from .requests import Request, read_requests
from .results import ReadModel, answer_requests
from .sampling import SamplingParams

__all__ = [
    "Conversation",
    "Predictor",
    "ReadModel",
    "Request",
    "SamplingParams",
    "Shard",
    "answer_all",
    "answer_likelihoods",
    "answer_requests",
    "find_shard",
    "load_predictor",
    "load_preparer",
    "read_requests",
]
