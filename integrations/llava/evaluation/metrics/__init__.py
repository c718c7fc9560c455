"""What scorers compare: texts and boxes read out of answers."""

from __future__ import annotations

from .boxes import as_box, intersection_over_union, parse_box

__all__ = [
    "as_box",
    "intersection_over_union",
    "parse_box",
]
