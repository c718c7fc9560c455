"""ScienceQA: the letter that its scorers find in an answer."""

from __future__ import annotations

import re

__all__ = ["read_science_qa_answer", "read_science_qa_answer_of_lmms"]

_LETTERS = "ABCDE"
# The full stop at the end of the published pattern stands for any character, which has to be there.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def read_science_qa_answer(answer: str, num_choices: int) -> str | None:
    """Read an answer as LLaVA's scorer does; None if no letter of a choice is found, which is wrong.

    The answer is a bare letter A to E; or begins with one, a full stop and a blank; or has exactly one sentence "The
    answer is X" with a character behind it. Other forms fail: "A.", "(A)", "a", " A", two sentences.
    """
    if len(answer) == 1 and answer in _LETTERS:
        letter = answer
    elif answer[:1] and answer[0] in _LETTERS and answer[1:3] == ". ":
        letter = answer[0]
    else:
        found = _SENTENCE.findall(answer)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter and letter in _LETTERS[:num_choices] else None


def read_science_qa_answer_of_lmms(answer: str) -> str | None:
    """Read an answer as lmms-eval does: the whole of it, or a capital letter at its start that a full stop follows.

    Blanks around it do not count, nor does the case of a letter alone.
    """
    answer = answer.strip()
    if len(answer) == 1:
        return answer.upper()
    if answer[:1].isupper() and answer[1:2] == ".":
        return answer[0]
    return answer
