"""Counting objects: the number must be exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerfuse.errors import InputError

from ...metrics.text import parse_count
from ...task import TASKS, Question, Task

__all__ = ["CountingTask"]


@TASKS.register("counting")
class CountingTask(Task):
    """The only number in the answer equals the right one.

    Example:
        ``How many circles are there?`` is answered ``2``; ``two`` and ``There are 2.`` count too.
    """

    title = "counting"
    source = "TallyQA: accuracy"
    question_file = "test.jsonl"

    def read_answer(self, value: Any) -> str:
        """Read a count, in digits or in words up to ten."""
        answer = str(super().read_answer(value))
        if parse_count(answer) is None:
            raise InputError(f"answer is {answer:.80}; give one whole number.")
        return answer

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a count, in digits or in words up to ten; no number, or several, is wrong."""
        return {"accuracy": float(parse_count(answer) == parse_count(str(question.answer)) is not None)}
