"""Saying where a named object is, as a box."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerfuse.errors import InputError

from ...metrics.boxes import as_box, intersection_over_union, parse_box
from ...task import TASKS, Question, Task

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
    question_file = "test.jsonl"

    def read_answer(self, value: Any) -> tuple[float, ...]:
        """Read a box: four numbers, or a text that holds them."""
        numbers = isinstance(value, list) and all(type(number) in (int, float) for number in value)
        corners = parse_box(value) if isinstance(value, str) else as_box(value) if numbers else None
        if corners is None:
            raise InputError(
                f"answer is {json.dumps(value):.80}; give a box [x1, y1, x2, y2] in fractions of the image's "
                "sides, x1 < x2, y1 < y2."
            )
        return corners

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a box; one that cannot be read has an IoU of 0."""
        expected = question.answer if isinstance(question.answer, tuple) else parse_box(question.answer)
        given = parse_box(answer)
        overlap = 0.0 if given is None or expected is None else intersection_over_union(given, expected)
        return {"accuracy": float(overlap > _THRESHOLD), "iou": overlap}
