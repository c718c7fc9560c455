"""Short answers that are right if they are the right words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerfuse.errors import InputError

from ..metrics.text import normalise_answer
from ..task import TASKS, Question, Task

__all__ = ["ExactMatchTask", "ShortAnswerTask"]


class ShortAnswerTask(Task):
    """A right answer that is a text, or several of which each is right."""

    def read_answer(self, value: Any) -> str | tuple[str, ...]:
        """Read a text or a number, or a list of them; none may be empty once it is normalised."""
        several = isinstance(value, list)
        read = tuple(str(Task.read_answer(self, one)) for one in (value if several else [value]))
        if not read or not all(map(normalise_answer, read)):
            raise InputError(f"answer is {json.dumps(value):.80}; give a text with a word in it, or several in a list.")
        return read if several else read[0]

    def accepted(self, question: Question) -> list[str]:
        """Return the right answers of a question, normalised."""
        given = question.answer
        return [normalise_answer(str(one)) for one in (given if isinstance(given, tuple | list) else [given])]


@TASKS.register("exact_match")
class ExactMatchTask(ShortAnswerTask):
    """Exact match after normalisation.

    Case, blanks, one pair of quotes, a leading article and a final full stop are forgiven.

    Example:
        ``What animal is this?`` is answered ``cat``; ``["cat", "kitten"]`` lets either be right.
    """

    title = "exact match"
    source = "GQA: exact match of a short answer"

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a short answer."""
        return {"accuracy": float(normalise_answer(answer) in self.accepted(question))}
