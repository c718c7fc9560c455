"""Questions with lettered options, one of which is right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from layerfuse.errors import InputError

from ..metrics.text import parse_choice
from ..task import TASKS, Question, Task

__all__ = ["MultipleChoiceTask"]

_SUFFIX = "Answer with the option's letter from the given choices directly."


@TASKS.register("multiple_choice")
class MultipleChoiceTask(Task):
    """The answer names the right option, by its letter or its text.

    Where a row has ``choices``, a list of texts, they are asked as lines ``A. …`` behind the question, and LLaVA's
    sentence that asks for the letter; else the options stand in ``text`` already.

    Example:
        ``What is this?`` with the choices ``["a cat", "a dog"]`` is answered ``B``; ``a dog`` and ``(B)`` are right.
    """

    title = "multiple choice"
    source = "LLaVA-1.5: options by letter"

    def prompt(self, question: Question) -> str:
        """Return the question, its options and the sentence that asks for the letter."""
        choices = question.fields.get("choices", ())
        options = [f"{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(choices)]
        return "\n".join([question.text, *options, _SUFFIX]) if options else question.text

    def read(self, question: Question) -> Question:
        """Read the right option: its letter, or its text."""
        choices, answer = question.fields.get("choices", []), question.answer
        texts = isinstance(choices, list | tuple) and all(isinstance(choice, str) for choice in choices)
        if not texts or len(choices) > 26 or len(set(choices)) < len(choices):
            raise InputError(f"choices are {json.dumps(choices):.80}; give up to 26 texts that differ, in a list.")
        letter = parse_choice(answer, choices) if isinstance(answer, str) else None
        if letter is None:
            raise InputError(f"answer is {json.dumps(answer):.80}; give the letter of an option, or its text.")
        return replace(question, answer=letter)

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a choice; none, or several, is wrong."""
        return {"accuracy": float(parse_choice(answer, question.fields.get("choices", ())) == question.answer)}
