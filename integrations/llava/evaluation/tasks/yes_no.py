"""Questions that are answered with yes or no."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerfuse.errors import InputError

from ..metrics.text import parse_yes_no
from ..task import TASKS, Question, Task

__all__ = ["YesNoTask"]


@TASKS.register("yes_no")
class YesNoTask(Task):
    """The answer says what is right: its first word, or the only one of "yes" and "no" in it.

    Example:
        ``Is there a cat?`` is answered ``yes``; ``Yes, there is.`` is right.
    """

    title = "yes or no"
    source = "POPE, MME: accuracy"

    def read_answer(self, value: Any) -> str:
        """Read yes or no: one of these words, or true or false."""
        said = {True: "yes", False: "no"}[value] if isinstance(value, bool) else parse_yes_no(str(value))
        if said is None:
            raise InputError(f'answer is {json.dumps(value):.80}; give "yes" or "no", true or false.')
        return said

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score yes or no; an answer in which neither can be read is wrong."""
        return {"accuracy": float(parse_yes_no(answer) == question.answer)}
