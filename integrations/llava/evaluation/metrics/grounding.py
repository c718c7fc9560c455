"""Boxes of referring expressions: as models write them, and the two frames that their numbers may refer to.

A model that sees an image padded to a square may mean the square's sides or the image's own. LLaVA-1.5 was trained on
boxes in the square; lmms-eval's scorer, whose numbers the paper shows, takes them for the image's.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

__all__ = ["Box", "decode_grounding_answer", "grounding_overlap", "pad_box", "parse_float_box", "unpad_box"]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge: (x1, y1, x2, y2)."""

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_FLOATS = re.compile(rf"\[\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\s*\]")
_BRACKETS = re.compile(r"\[\[.*?\]\]")


def pad_box(box: Box, width: int, height: int) -> Box:
    """Convert a box from fractions of an image's sides to fractions of the square that it is padded to.

    The image stands in the middle, as preprocessing pads it: (longer - shorter) // 2 pixels before the shorter side.
    """
    side, left, top = _square(width, height)
    x1, y1, x2, y2 = box
    return (
        (x1 * width + left) / side,
        (y1 * height + top) / side,
        (x2 * width + left) / side,
        (y2 * height + top) / side,
    )


def unpad_box(box: Box, width: int, height: int) -> Box:
    """Convert a box from fractions of the padded square to fractions of the image's sides; the inverse of `pad_box`.

    What lies on the padding becomes negative, or more than 1.
    """
    side, left, top = _square(width, height)
    x1, y1, x2, y2 = box
    return (
        (x1 * side - left) / width,
        (y1 * side - top) / height,
        (x2 * side - left) / width,
        (y2 * side - top) / height,
    )


def parse_float_box(answer: str) -> Box | None:
    """Read the first ``[x1, y1, x2, y2]`` of plain numbers in an answer, as lmms-eval does; None if there is none."""
    found = _FLOATS.search(answer)
    if found is None:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return x1, y1, x2, y2


def decode_grounding_answer(
    answer: str, width: int, height: int, *, scale: float = 999, square_pad: bool = False
) -> Box:
    """Read ``[[x1, y1, x2, y2]]`` in steps of 1 / scale, as MMFuser's eval_grounding.py does, as a box in pixels.

    The first double brackets count, and the first box in them. What is no box of four numbers is one of zeros. All is
    computed in single precision, as there.

    Args:
        answer: of the model.
        width: of the image, in pixels.
        height: of the image, in pixels.
        scale: number that stands for a whole side.
        square_pad: the numbers refer to the square that the image is padded to.
    """
    numbers = _bracketed(answer)
    box = np.zeros(4, np.float32)
    side, left, top = _square(width, height)
    if numbers is not None:
        sides = (side, side) if square_pad else (width, height)
        box = np.asarray(numbers, np.float32) / np.float32(scale) * np.asarray(sides * 2, np.float32)
    if square_pad:
        box = box - np.asarray((left, top) * 2, np.float32)
    x1, y1, x2, y2 = map(float, box)
    return x1, y1, x2, y2


def grounding_overlap(first: Box, second: Box) -> float:
    """Intersection over union in single precision, so that what lies on the threshold falls as it was published."""
    one, two = np.asarray(first, np.float32), np.asarray(second, np.float32)
    shared = np.prod(np.maximum(np.minimum(one[2:], two[2:]) - np.maximum(one[:2], two[:2]), np.float32(0)))
    areas = [np.prod(box[2:] - box[:2]) for box in (one, two)]
    with np.errstate(all="ignore"):
        return float(shared / (areas[0] + areas[1] - shared))


def _square(width: int, height: int) -> tuple[int, int, int]:
    """Side of the square around an image, and the pixels left of and above it."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def _bracketed(answer: str) -> list[float] | None:
    found = _BRACKETS.search(answer)
    if found is None:
        return None
    try:
        boxes: Any = json.loads(found[0])
    except (ValueError, RecursionError):
        return None
    first = boxes[0] if isinstance(boxes, list) and boxes else None
    if not isinstance(first, list) or len(first) != 4 or not all(isinstance(own, int | float) for own in first):
        return None
    try:
        return [float(own) for own in first]
    except OverflowError:
        return None
