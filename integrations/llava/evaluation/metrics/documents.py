"""Short answers about documents and charts: nearly the same text (ANLS), nearly the same number."""

from __future__ import annotations

from collections.abc import Sequence

from .text import edit_distance

__all__ = ["anls", "chart_answer_is_right"]

_LEAST_SIMILARITY = 0.5
_LARGEST_CHANGE = 0.05


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (DocVQA): 1 - edits / length to the nearest reference, 0 below 0.5.

    Texts are compared in lower case with single blanks; as in the published scorer, the length is that of the longer
    text as it was written.
    """
    said = " ".join(answer.lower().split())
    distances = []
    for reference in references:
        length = max(len(answer.upper()), len(reference.upper()))
        edits = edit_distance(" ".join(reference.lower().split()), said)
        distances.append(edits / length if length else 0.0)
    similarity = 1 - min(distances, default=1.0)
    return similarity if similarity >= _LEAST_SIMILARITY else 0.0


def chart_answer_is_right(answer: str, reference: str) -> bool:
    """ChartQA's relaxed accuracy: numbers may be off by 5 %, other texts are the same but for case.

    ``50%`` is 0.5; a reference of 0 is compared as a text, as are numbers with thousands commas or units.
    """
    said, right = _chart_number(answer), _chart_number(reference)
    if said is not None and right:
        return abs(said - right) / abs(right) <= _LARGEST_CHANGE
    return answer.lower() == reference.lower()


def _chart_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
