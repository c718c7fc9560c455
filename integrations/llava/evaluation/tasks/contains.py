"""Answers that are right if they hold the right words."""

from __future__ import annotations

from collections.abc import Mapping

from ..metrics.text import holds_words, normalise_answer
from ..task import TASKS, Question
from .exact_match import ShortAnswerTask

__all__ = ["ContainsTask"]


@TASKS.register("contains")
class ContainsTask(ShortAnswerTask):
    """The right words stand somewhere in the answer, as whole words, normalised as for an exact match.

    Example:
        ``What does the sign say?`` is answered ``exit``; ``The sign says "Exit".`` is right, ``exits`` is not.
    """

    title = "contains"
    source = "OCRBench: the right text occurs in the answer; here as whole words"

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a free answer."""
        said = normalise_answer(answer)
        return {"accuracy": float(any(holds_words(said, right) for right in self.accepted(question)))}
