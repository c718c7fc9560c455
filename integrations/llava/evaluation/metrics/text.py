"""Free text of a model in forms that can be compared; nothing here raises: what cannot be read is a wrong answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

__all__ = [
    "edit_distance",
    "holds_words",
    "normalise_answer",
    "parse_choice",
    "parse_count",
    "parse_number",
    "parse_yes_no",
    "strip_answer",
]

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNTS = {**{word: number for number, word in enumerate(_NUMBER_WORDS)}, "none": 0, "no": 0}
_ARTICLES = re.compile(r"^(?:a|an|the)\s+")
# What looks like a number: "1-2", "2.5.1" and "2,5" are found whole or in parts, and refused or counted as several.
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)*|(?:\.[0-9]+)+)(?:e[-+]?[0-9]+)?")
_WHOLE_NUMBER = re.compile(r"[-+]?(?:(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?|\.[0-9]+)(?:e[-+]?[0-9]{1,3})?")
_LETTER = re.compile(r"\(?([A-Z])(?:[).:].*)?", re.DOTALL)
_NAMED_LETTER = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?)\s*:?\s*\(?([A-Z])\b(?!')")


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
    """The only number in an answer, in digits or as a word from zero to ten; None if there is none or several."""
    words = re.findall(r"[0-9]+(?:[.,][0-9]+)*|[a-z]+", normalise_answer(answer))
    digits = [word for word in words if word[0].isdigit()]
    # Nine digits: no count is longer, and int() refuses strings of thousands.
    if not all(word.isdigit() and len(word) <= 9 for word in digits):
        return None
    numbers = {*map(int, digits), *(_COUNTS[word] for word in words if word in _COUNTS)}
    return numbers.pop() if len(numbers) == 1 else None


def parse_number(answer: str) -> Decimal | None:
    """The only number in an answer, as digits (``-1,234.5``, ``2e3``, ``40 %``) or a word, zero to ten.

    None if the answer names no number or several, or one whose commas part no thousands.
    """
    text = normalise_answer(answer).replace("\u2212", "-")
    found = _NUMBER.findall(text)
    if not all(len(part) <= 40 and _WHOLE_NUMBER.fullmatch(part) for part in found):
        return None
    numbers = {Decimal(part.replace(",", "")) for part in found}
    numbers |= {Decimal(_NUMBER_WORDS.index(word)) for word in re.findall(r"[a-z]+", text) if word in _NUMBER_WORDS}
    return numbers.pop() if len(numbers) == 1 else None


def parse_yes_no(answer: str) -> str | None:
    """Yes or no, in lower case: the first word if it is one of them, else the only one in the answer; else None."""
    words = re.findall(r"\w+", normalise_answer(answer))
    said = words[:1] if words[:1] in (["yes"], ["no"]) else sorted({"yes", "no"}.intersection(words))
    return said[0] if len(said) == 1 else None


def parse_choice(answer: str, choices: Sequence[str] = ()) -> str | None:
    """Read the capital letter of an option; None if no option is named, or several are.

    The first of these that fits counts: the letter alone, in any case, also as ``(B)`` or ``B.``; an answer that
    begins with ``B.``, ``B)``, ``(B)`` or ``B:``; the text of an option; the only letter that stands behind "answer",
    "option" or "choice". Without `choices`, the texts of options A, B, …, any letter is an option.
    """
    letters = [chr(ord("A") + index) for index in range(len(choices) or 26)]
    text = strip_answer(answer)
    written = _LETTER.fullmatch(text.upper() if len(text.strip("().:")) == 1 else text)
    if written is not None and written[1] in letters:
        return written[1]
    said = normalise_answer(answer)
    meant = {
        letter for letter, choice in zip(letters, choices, strict=False) if said and normalise_answer(choice) == said
    }
    named = meant or set(_NAMED_LETTER.findall(text)).intersection(letters)
    return named.pop() if len(named) == 1 else None


def holds_words(text: str, words: str) -> bool:
    """Tell whether words stand in a text as such: "cat" is in "a cat." and not in "cats".

    Letters of scripts that are written without blanks, such as Chinese, part words.
    """
    starts = (found.start() for found in re.finditer(f"(?={re.escape(words)})", text))
    return any(
        not _joined(text[:start][-1:], words[:1]) and not _joined(words[-1:], text[start + len(words) :][:1])
        for start in starts
    )


def _joined(left: str, right: str) -> bool:
    """Whether two characters beside one another belong to one word."""
    return all(char.isalnum() and unicodedata.east_asian_width(char) not in "WF" for char in (left, right))


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one string into the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
