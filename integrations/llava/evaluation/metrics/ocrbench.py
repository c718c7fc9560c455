"""OCRBench: whether the right text stands in an answer, and the sums that its table shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["CATEGORIES", "RECOGNITION_TYPES", "ocrbench_sums", "stands_in_answer"]

RECOGNITION_TYPES = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
CATEGORIES = {
    "recognition": RECOGNITION_TYPES,
    "scene_vqa": ("Scene Text-centric VQA",),
    "document_vqa": ("Doc-oriented VQA",),
    "key_information": ("Key Information Extraction",),
    "handwritten_mathematics": ("Handwritten Mathematical Expression Recognition",),
}
"""Columns of the table -> the types of questions that they add up."""

# The one data set of formulas: blanks mean nothing there, and the case does.
_FORMULAS = "HME100k"
# The wide forms of ASCII, and the wide blank.
_NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def stands_in_answer(answer: str, right: Sequence[str], dataset: str, *, narrow: bool = False) -> bool:
    """Whether one of the right texts stands anywhere in an answer.

    Both in lower case, without blanks around them, line breaks as blanks; of formulas (HME100k) all blanks go and the
    case stays. With `narrow`, as lmms-eval does, wide characters of ASCII are like narrow ones, but for formulas.
    """
    if narrow and dataset != _FORMULAS:
        answer, right = answer.translate(_NARROW), [own.translate(_NARROW) for own in right]
    return any(_comparable(own, dataset) in _comparable(answer, dataset) for own in right)


def ocrbench_sums(scored: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Add up pairs of a question's type and its score, 0 or 1: ``score``, then each of `CATEGORIES`, then each type."""
    sums = dict.fromkeys((kind for kinds in CATEGORIES.values() for kind in kinds), 0.0)
    for kind, score in scored:
        sums[kind] += score
    parts = {name: sum(sums[kind] for kind in kinds) for name, kinds in CATEGORIES.items()}
    return {"score": sum(parts.values()), **parts, **sums}


def _comparable(text: str, dataset: str) -> str:
    if dataset == _FORMULAS:
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.lower().strip().replace("\n", " ")
