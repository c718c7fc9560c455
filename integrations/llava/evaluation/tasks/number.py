"""Questions that are answered with a number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal

from layerfuse.errors import InputError

from ..metrics.text import parse_number
from ..task import TASKS, Question, Task

__all__ = ["NumberTask"]


@TASKS.register("number")
class NumberTask(Task):
    """The only number in the answer equals the right one, or is as near as the row's ``tolerance`` allows.

    Example:
        ``How long is it?`` is answered ``2.5``; ``2.50 m`` is right, and ``2.4`` with a tolerance of 0.1.
    """

    title = "number"
    source = "layerfuse's own"

    def read(self, question: Question) -> Question:
        """Read a number, and how far an answer may be from it."""
        tolerance = question.fields.get("tolerance", 0)
        if type(tolerance) not in (int, float) or not 0 <= tolerance < math.inf:
            raise InputError(f"tolerance is {json.dumps(tolerance):.80}; give 0 or a positive number.")
        text = self.read_answer(question.answer)
        number = parse_number(text)
        if number is None:
            raise InputError(f"answer is {text:.80}; give one number.")
        return replace(question, answer=f"{number:f}")

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a number; none, or several, is wrong."""
        given, right = parse_number(answer), Decimal(question.answer)
        near = given is not None and abs(given - right) <= Decimal(str(question.fields.get("tolerance", 0)))
        return {"accuracy": float(given == right or near)}
