"""ChartQA: questions about charts, whose numbers may be off by 5 %.

Layout: ``hf download --repo-type dataset lmms-lab/ChartQA --local-dir DATA/chartqa``: ``data/test-*.parquet`` of
``type`` (human_test or augmented_test), ``question``, ``answer``, ``image``.

Source: Masry et al., "ChartQA", Findings of ACL 2022, section 5.1; lmms-eval's ``chartqa``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ...metrics.documents import chart_answer_is_right
from ...published_files import parquet_rows
from ...table_pictures import stored_picture, table_picture
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from ..paper.benchmark import BenchmarkTask
from ..paper.prompts import SHORT_ANSWER

__all__ = ["ChartQaTask"]

_FILES = "chartqa/data/test-*.parquet"


@TASKS.register("chartqa")
class ChartQaTask(BenchmarkTask):
    r"""Relaxed accuracy, over all questions, and over those written by people and by a program.

    Example:
        ``How many food items are shown in the bar graph?\nAnswer the question using a single word or phrase.`` is
        answered ``14``; ``14.5`` is right, too, ``14 items`` is not.
    """

    title = "ChartQA"
    source = "ChartQA: relaxed accuracy, as in lmms-eval"
    group = "extra"
    protocols = ("lmms",)
    answer_lengths: ClassVar[Mapping[str, int]] = {"lmms": 16}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the parquet files."""
        return (NeededFile(_FILES, "questions and charts", "Hugging Face, lmms-lab/ChartQA"),)

    def load(self, folder: str | Path) -> list[Question]:
        """Read the test split, and store its charts as files."""
        questions = []
        for number, row in enumerate(parquet_rows(self, folder, _FILES, ["type", "question", "answer", "image"])):
            image = stored_picture(folder, "chartqa", table_picture(row["image"], f"ChartQA's row {number}"))
            part = "human" if row["type"] == "human_test" else "augmented"
            questions.append(Question(number, image, row["question"], "chartqa", str(row["answer"]), {"part": part}))
        return questions

    def prompt(self, question: Question) -> str:
        """Return the question, and what kind of answer is wanted."""
        return question.text + SHORT_ANSWER

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a number, or a text."""
        return {"accuracy": float(chart_answer_is_right(answer, question.answer))}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Average over all, and over each part."""
        numbers = super().aggregate(scores)
        for part in ("human", "augmented"):
            own = [one for one in scores if one.question.fields["part"] == part]
            if own:
                numbers[part] = super().aggregate(own)["accuracy"]
        return numbers
