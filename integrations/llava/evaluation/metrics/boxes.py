"""Boxes in answers: read from text, and compared."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

__all__ = ["as_box", "intersection_over_union", "parse_box"]

_DECIMAL = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_BOX = re.compile(r"\[([^\[\]]*)\]")


def parse_box(answer: str) -> tuple[float, float, float, float] | None:
    """Read a box in LLaVA's form ``[x1, y1, x2, y2]``, fractions of the image's sides; the first brackets count.

    None if they do not hold exactly four plain decimals between 0 and 1 with x1 < x2 and y1 < y2.
    """
    found = _BOX.search(answer)
    if found is None:
        return None
    parts = [part.strip() for part in found.group(1).split(",")]
    if len(parts) != 4 or not all(re.fullmatch(_DECIMAL, part) for part in parts):
        return None
    return as_box([float(part) for part in parts])


def as_box(numbers: Sequence[float]) -> tuple[float, float, float, float] | None:
    """Take four numbers as a box, if they are between 0 and 1 with x1 < x2 and y1 < y2."""
    if len(numbers) != 4 or not all(math.isfinite(value) and 0 <= value <= 1 for value in numbers):
        return None
    x1, y1, x2, y2 = map(float, numbers)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def intersection_over_union(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Area that two boxes (x1, y1, x2, y2) share, over the area that they cover together; 0 where they do not meet."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    shared = width * height
    return shared / (areas[0] + areas[1] - shared)
