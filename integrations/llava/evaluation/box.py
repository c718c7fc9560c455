"""Saying where a named object is, as a box."""

from __future__ import annotations

from collections.abc import Mapping

from integrations.llava.evaluation.answers import intersection_over_union, parse_box
from integrations.llava.evaluation.task import TASKS, Question, Task

__all__ = ["BoxTask"]

_THRESHOLD = 0.5


@TASKS.register("box")
class BoxTask(Task):
    """Intersection over union above 0.5, strictly, as in referring expression comprehension.

    Example:
        ``Where is the red ring?`` is answered ``[0.25, 0.50, 0.36, 0.61]``: left, top, right and bottom edge as
        fractions of the image's sides.
    """

    title = "locating (box)"
    source = "RefCOCO: precision at IoU > 0.5"
    metrics = ("accuracy", "iou")

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a box; one that cannot be read has an IoU of 0."""
        expected = question.answer if isinstance(question.answer, tuple) else parse_box(question.answer)
        given = parse_box(answer)
        overlap = 0.0 if given is None or expected is None else intersection_over_union(given, expected)
        return {"accuracy": float(overlap > _THRESHOLD), "iou": overlap}
