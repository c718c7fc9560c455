"""Bringing free text that a model wrote into a form that can be compared.

Nothing here ever raises on any string: an answer that cannot be read is a wrong answer.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

__all__ = [
    "as_box",
    "edit_distance",
    "intersection_over_union",
    "normalise_answer",
    "parse_box",
    "parse_count",
    "strip_answer",
]

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNTS = {**{word: number for number, word in enumerate(_NUMBER_WORDS)}, "none": 0, "no": 0}
_ARTICLES = re.compile(r"^(?:a|an|the)\s+")
_DECIMAL = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_BOX = re.compile(r"\[([^\[\]]*)\]")


def strip_answer(answer: str) -> str:
    """Remove what surrounds an answer: blanks, one pair of quotes, a full stop behind or inside them. Case is kept."""
    text = unicodedata.normalize("NFKC", answer).strip()
    text = text.removesuffix(".").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`":
        text = text[1:-1].strip().removesuffix(".").strip()
    return text


def normalise_answer(answer: str) -> str:
    """Make short answers comparable: stripped, lower case, single blanks, without a leading article."""
    return _ARTICLES.sub("", " ".join(strip_answer(answer).casefold().split()))


def parse_count(answer: str) -> int | None:
    """Read a count: the only number in the answer, in digits or as a word from zero to ten.

    Returns:
        The number, or None if the answer names no number or several.
    """
    words = re.findall(r"[0-9]+(?:[.,][0-9]+)*|[a-z]+", normalise_answer(answer))
    numbers = {
        _COUNTS[word] if word in _COUNTS else int(word) for word in words if word in _COUNTS or _is_integer(word)
    }
    fractions = [word for word in words if word[0].isdigit() and not _is_integer(word)]
    return numbers.pop() if len(numbers) == 1 and not fractions else None


def _is_integer(word: str) -> bool:
    # Nine digits: no count is longer, and int() refuses strings of thousands.
    return word.isascii() and word.isdigit() and len(word) <= 9


def parse_box(answer: str) -> tuple[float, float, float, float] | None:
    """Read a box in LLaVA's form ``[x1, y1, x2, y2]``, fractions of the image's sides; the first brackets count.

    Returns:
        (x1, y1, x2, y2), or None if the brackets do not hold exactly four plain decimals between 0 and 1 with
        x1 < x2 and y1 < y2.
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


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one string into the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
