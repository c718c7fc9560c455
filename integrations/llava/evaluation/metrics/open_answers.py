"""Free answers to MMMU's open questions: what an answer comes to, and whether that is right."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["open_answer_is_right"]

_ANNOUNCES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def open_answer_is_right(answer: str, references: Sequence[str]) -> bool:
    """Whether a free answer holds one of the right ones, by MMMU's rule.

    What counts is, of each line, the shortest end behind a word such as "is", "so" or "answer" (in the last line also
    behind "="), or all if there is none; and every number in that. A right text has to stand in one of these, case
    aside; a right number has to equal one, both rounded to two digits.
    """
    right = {form for reference in references for form in _forms(reference)}
    for said in {form for part in _said(answer) for form in _forms(part)}:
        if isinstance(said, str):
            if any(isinstance(form, str) and form in said for form in right):
                return True
        elif said in right:
            return True
    return False


def _said(answer: str) -> list[str]:
    """The parts of an answer that count, and the numbers in them."""
    text = answer.strip().strip(".").lower()
    lines = text.split("\n")
    parts = []
    for number, line in enumerate(lines, start=1):
        announces = (*_ANNOUNCES, "=") if number == len(lines) else _ANNOUNCES
        shortest = ""
        for end in (line.split(word)[-1].strip() for word in announces if word in line):
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    parts = parts or [text]
    return parts + [number for part in parts for form in _NUMBERS for number in re.findall(form, part)]


def _forms(text: str) -> list[str | float]:
    """A number as such, with two digits; else the text in lower case, one letter with a blank at either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
