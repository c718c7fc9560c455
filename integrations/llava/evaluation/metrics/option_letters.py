"""Letters of options in answers, as each benchmark's own scorer finds them."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping

__all__ = ["ai2d_letter", "circular_letter", "mmmu_letter", "mmstar_letter", "mmstar_letter_of_lmms"]

_MARKS = ",.!?;:'\""
# Behind which lmms-eval looks for MMStar's letter.
_PHRASES = (
    *(
        f"{the}{kind}{what} is"
        for the in ("the ", "")
        for kind in ("correct ", "best ")
        for what in ("answer", "option")
    ),
    *(f"{the}{kind}choice is" for the in ("the ", "") for kind in ("correct ", "")),
    *("the answer is", "answer is", "i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LAST_WORDS = 5
_SHORT_ANSWER = 5


def circular_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """Find the letter as VLMEvalKit does without its judge (`can_infer`); None where it would ask the judge.

    Brackets, stops and the like become blanks. If just one of the letters is a word then, and its first place is among
    the last four words, it counts; a refusal counts as the letter ``Z``, which is no option; else the only option
    whose text stands in the answer, case aside, unless the answer is more than twice as long as all options together.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_BLANKED).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _LAST_WORDS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    said = answer.lower()
    if len(said) > 2 * sum(map(len, options.values())):
        return None
    told = [letter for letter, text in options.items() if text.lower() in said]
    return told[0] if len(told) == 1 else None


def mmmu_letter(answer: str, options: Mapping[str, str], *, seed: str, loosely: bool = False) -> str:
    """Find the letter as MMMU does; where there is none, it is chosen at random, the same for the same `seed`.

    Of these the first that finds something counts, and of several finds the last in the answer: ``(A)``; an ``A``
    between blanks (`loosely`, as in lmms-eval: before a blank, then ``A.``); in an answer of more than five words, the
    text of an option, case aside.
    """
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        answer = answer.strip(mark)
    text = f" {answer} "
    forms = ("{} ", "{}.") if loosely else (" {} ",)
    bracketed = {letter: text.rfind(f"({letter})") for letter in options if f"({letter})" in text}
    if bracketed:
        return _last(bracketed)
    for form in forms:
        # Where several are found, the places that are compared are those of letters between blanks, in either form.
        alone = {letter: text.rfind(f" {letter} ") for letter in options if form.format(letter) in text}
        if alone:
            return _last(alone)
    if len(text.split()) > _SHORT_ANSWER:
        lower = text.lower()
        told = {letter: lower.rfind(option.lower()) for letter, option in options.items() if option.lower() in lower}
        if told:
            return _last(told)
    return random.Random(seed).choice(list(options))


def mmstar_letter(answer: str) -> str | None:
    """Find the letter as MMStar does: the first character, or that behind ``(``, ``option `` or ``the answer is ``."""
    said = answer.lower().strip().replace("\n", " ")
    for start in ("the answer is ", "option ", "("):
        if said.startswith(start):
            return said[len(start) : len(start) + 1].upper() or None
    return said[:1].upper() or None


def mmstar_letter_of_lmms(answer: str, letters: str = "ABCD") -> str:
    """Find the letter as lmms-eval 0.7.3 does: of all capitals that may be one, that in the surest place.

    Surest is the front, then the end, then what follows a phrase such as "the answer is", then "(A)", "A.", "A:", "A)",
    "A "; of equally sure ones the last. If there is none, the last capital at all.
    """
    said = answer.strip()
    for mark in _MARKS:
        said = said.strip(mark)
    padded, bare = f" {said} ", said.strip()
    found: list[tuple[int, int, str]] = []
    for sureness, form in enumerate(("{} ", "{})", "{}:", "{}.", "({})"), start=2):
        found += [(sureness, padded.rfind(form.format(letter)), letter) for letter in letters]
    for phrase in _PHRASES:
        _, cut, behind = padded.lower().partition(phrase)
        start = len(padded) - len(behind) if cut else len(padded)
        found += [(7, padded.find(letter, start), letter) for letter in letters]
    found += [(10, 0, own) for own in letters if bare.startswith(own) and not bare[1:2].isalpha()]
    found += [(9, len(bare), own) for own in letters if bare.endswith(own) and not bare[-2:-1].isalpha()]
    found += [(0, padded.rfind(letter), letter) for letter in letters]
    return max((own for own in found if own[1] >= 0), key=lambda own: own[:2], default=(0, 0, ""))[2]


def ai2d_letter(answer: str) -> str:
    """Find what lmms-eval compares with AI2D's letter: the capital before a full stop at the front, else all.

    Punctuation is left out, and it is put into upper case.
    """
    found = re.match(r"\s*([A-Z])\.", answer)
    return (found[1] if found else answer).translate(_PUNCTUATION).upper()


def _last(places: Mapping[str, int]) -> str:
    """The key with the largest value; of equal ones the first."""
    return max(places, key=lambda letter: places[letter])
