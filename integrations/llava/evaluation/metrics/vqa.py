"""Short answers compared as VQA's server does: normalised, and against ten people's answers.

Rules and slips are those of `EvalAIAnswerProcessor`, which LLaVA, lmms-eval and TextVQA's authors all use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["normalise_vqa_answer", "soft_vqa_score"]

_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_DIGITS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,+\d")
# The published pattern means to spare a full stop behind a digit and does not: only one before a digit is spared. And
# a flag stands where the number of replacements belongs, so that full stops beyond the 32nd stay.
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32

_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspellings(word: str) -> list[str]:
    """Spell a word with each of its apostrophes left out in turn."""
    return [word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"]


# Right spellings of contractions; the last one is a slip of the published table.
_CONTRACTIONS = {wrong: right for right in _WITH_APOSTROPHES.split() for wrong in _misspellings(right)}
_CONTRACTIONS["somebody'd"] = "somebodyd"


def normalise_vqa_answer(answer: str) -> str:
    """Bring an answer into the form that VQA's server compares: words in lower case, digits, no articles.

    In this order: lower case; commas and question marks go, ``'s`` becomes a word of its own; other punctuation goes
    where it touches a blank, or anywhere if the text has a comma between digits, else it becomes a blank; full stops
    go unless a digit follows; numbers up to ten become digits; articles go; contractions get their apostrophes.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced, joins = text, _COMMA_BETWEEN_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        goes = joins or f"{mark} " in spaced or f" {mark}" in spaced
        text = text.replace(mark, "" if goes else " ")
    text = _FULL_STOP.sub("", text, count=_MOST_FULL_STOPS)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_vqa_score(answer: str, people: Sequence[str]) -> float:
    """Score an answer between 0 and 1 by how many people gave it, both sides normalised.

    Each person is left out in turn; an answer that three of the others gave is right, fewer give a third each; the
    mean over the people counts. With ten people: none 0, one 0.3, two 0.6, three 0.9, four 1.
    """
    said = normalise_vqa_answer(answer)
    same = [normalise_vqa_answer(one) == said for one in people]
    count = sum(same)
    return sum(min((count - own) / 3, 1.0) for own in same) / len(people)
