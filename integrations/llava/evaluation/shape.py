"""Naming the shape of a named object, in one word."""

from __future__ import annotations

from integrations.llava.evaluation.exact_match import ExactMatchTask
from integrations.llava.evaluation.task import TASKS

__all__ = ["ShapeTask"]


@TASKS.register("shape")
class ShapeTask(ExactMatchTask):
    """Exact match after normalisation.

    Example:
        ``What shape is the red object?`` is answered ``ring``.
    """

    title = "shape"
    question_file = "test.jsonl"
