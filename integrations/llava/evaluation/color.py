"""Naming the colour of a named object, in one word."""

from __future__ import annotations

from collections.abc import Mapping

from integrations.llava.evaluation.answers import normalise_answer
from integrations.llava.evaluation.task import TASKS, Question, Task

__all__ = ["ColorTask"]


@TASKS.register("color")
class ColorTask(Task):
    """Exact match after normalisation.

    Example:
        ``What color is the ring?`` is answered ``red``.
    """

    title = "colour"
    source = "GQA: exact match of a short answer"

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a word; case, blanks, quotes, a leading article and a final full stop are forgiven."""
        return {"accuracy": float(normalise_answer(answer) == normalise_answer(str(question.answer)))}
