"""Naming the shape of a named object, in one word."""

from __future__ import annotations

from ...task import TASKS
from ..exact_match import ExactMatchTask

__all__ = ["ShapeTask"]


@TASKS.register("shape")
class ShapeTask(ExactMatchTask):
    """Exact match after normalisation.

    Example:
        ``What shape is the red object?`` is answered ``ring``.
    """

    title = "shape"
    question_file = "test.jsonl"
