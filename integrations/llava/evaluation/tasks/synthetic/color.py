"""Naming the colour of a named object, in one word."""

from __future__ import annotations

from ...task import TASKS
from ..exact_match import ExactMatchTask

__all__ = ["ColorTask"]


@TASKS.register("color")
class ColorTask(ExactMatchTask):
    """Exact match after normalisation.

    Example:
        ``What color is the ring?`` is answered ``red``.
    """

    title = "colour"
    question_file = "test.jsonl"
