"""Naming the shape of a named object, in one word."""

from __future__ import annotations

from collections.abc import Mapping

from integrations.llava.evaluation.answers import normalise_answer
from integrations.llava.evaluation.task import TASKS, Question, Task

__all__ = ["ShapeTask"]


@TASKS.register("shape")
class ShapeTask(Task):
    """Exact match after normalisation.

    Example:
        ``What shape is the red object?`` is answered ``ring``.
    """

    title = "shape"
    source = "GQA: exact match of a short answer"

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a word; case, blanks, quotes, a leading article and a final full stop are forgiven."""
        return {"accuracy": float(normalise_answer(answer) == normalise_answer(str(question.answer)))}
