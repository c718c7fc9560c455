"""AI2D: school diagrams and lettered options.

Layout: ``hf download --repo-type dataset lmms-lab/ai2d --local-dir DATA/ai2d``: ``data/test-*.parquet`` of
``question``, ``options`` (a list), ``answer`` (the right one's place, from 0, as a text) and ``image``.

Source: Kembhavi et al., "A Diagram Is Worth a Dozen Images", ECCV 2016; lmms-eval's ``ai2d``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from layerfuse.errors import InputError

from ...metrics.option_letters import ai2d_letter
from ...option_lines import lettered, option_lines
from ...published_files import parquet_rows
from ...table_pictures import stored_picture, table_picture
from ...task import TASKS, NeededFile, Question
from ..paper.benchmark import BenchmarkTask
from ..paper.prompts import OPTION_LETTER

__all__ = ["Ai2dTask"]

_FILES = "ai2d/data/test-*.parquet"


@TASKS.register("ai2d")
class Ai2dTask(BenchmarkTask):
    r"""The answer is the letter, case and punctuation aside, or begins with it and a full stop.

    Example:
        ``What does the diagram show?\nA. …\nB. …\nAnswer with the option's letter from the given choices directly.``
        is answered ``B``; ``B. life cycle`` is right, too, ``(B) life cycle`` is not.
    """

    title = "AI2D"
    source = "AI2D: accuracy, as in lmms-eval"
    group = "extra"
    protocols = ("lmms",)
    answer_lengths: ClassVar[Mapping[str, int]] = {"lmms": 16}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the parquet files."""
        return (NeededFile(_FILES, "questions and diagrams", "Hugging Face, lmms-lab/ai2d"),)

    def load(self, folder: str | Path) -> list[Question]:
        """Read the test split, and store its diagrams as files."""
        questions = []
        for number, row in enumerate(parquet_rows(self, folder, _FILES, ["question", "options", "answer", "image"])):
            options, right = [str(one) for one in row["options"] or ()], str(row["answer"])
            if not right.isdecimal() or int(right) >= len(options):
                raise InputError(f"AI2D's row {number} has {len(options)} options and answer {right!r}; get it anew.")
            image = stored_picture(folder, "ai2d", table_picture(row["image"], f"AI2D's row {number}"))
            letter = list(lettered(options))[int(right)]
            questions.append(Question(number, image, row["question"], "ai2d", letter, {"options": options}))
        return questions

    def prompt(self, question: Question) -> str:
        """Return the question, its options, and what asks for the letter."""
        return question.text + option_lines(lettered(question.fields["options"])) + OPTION_LETTER

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a letter."""
        return {"accuracy": float(ai2d_letter(answer) == question.answer)}
