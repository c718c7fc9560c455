"""DocVQA and InfographicVQA: short answers read out of scanned pages and infographics, nearly right ones in part.

Layout: ``hf download --repo-type dataset lmms-lab/DocVQA --local-dir DATA/docvqa``: ``DocVQA/`` and ``InfographicVQA/``
with ``validation-*.parquet`` and ``test-*.parquet`` of ``questionId``, ``question``, ``answers`` (none in the test
split) and ``image``.

Source: Mathew et al., "DocVQA", WACV 2021, and "InfographicVQA", WACV 2022; lmms-eval's ``docvqa`` and ``infovqa``. The
test splits are scored by the server of the Robust Reading Competition (rrc.cvc.uab.es, challenge 17).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from layerfuse.errors import InputError

from ...metrics.documents import anls
from ...published_files import parquet_rows
from ...table_pictures import stored_picture, table_picture
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from ..paper.benchmark import BenchmarkTask
from ..paper.prompts import SHORT_ANSWER

__all__ = ["DocVqaTask", "DocVqaTestTask", "InfoVqaTask", "InfoVqaTestTask"]


@TASKS.register("docvqa")
class DocVqaTask(BenchmarkTask):
    r"""ANLS: the similarity of characters to the nearest right answer, 0 below a half; DocVQA, validation.

    Example:
        ``What is the date?\nAnswer the question using a single word or phrase.`` is answered ``May 3``; ``May 8`` is
        right by 4/5.
    """

    title = "DocVQA (val)"
    source = "DocVQA: ANLS"
    metric = "anls"
    group = "extra"
    protocols = ("lmms",)
    answer_lengths: ClassVar[Mapping[str, int]] = {"lmms": 128}
    kind: ClassVar[str] = "docvqa"
    data_set: ClassVar[str] = "DocVQA"
    split: ClassVar[str] = "validation"

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the parquet files of the split."""
        return (NeededFile(self._files, "questions and pages", "Hugging Face, lmms-lab/DocVQA"),)

    @property
    def _files(self) -> str:
        return f"docvqa/{self.data_set}/{self.split}-*.parquet"

    def load(self, folder: str | Path) -> list[Question]:
        """Read the split, and store its pages as files."""
        rows = parquet_rows(self, folder, self._files, ["questionId", "question", "answers", "image"])
        return [self._question(row, folder) for row in rows]

    def _question(self, row: Mapping[str, Any], folder: str | Path) -> Question:
        own_id = int(row["questionId"])
        answers = tuple(str(one) for one in row["answers"] or ())
        if not answers and self.split == "validation":
            raise InputError(f"{self.data_set}'s question {own_id} has no right answer; get the file anew.")
        image = stored_picture(folder, "docvqa", table_picture(row["image"], f"{self.data_set}'s question {own_id}"))
        return Question(own_id, image, row["question"], self.kind, answers or None)

    def prompt(self, question: Question) -> str:
        """Return the question, and what kind of answer is wanted."""
        return question.text + SHORT_ANSWER

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a text; nothing in the test split."""
        return {} if question.answer is None else {"anls": anls(answer, question.answer)}

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes] | None:
        """Return the test split's file for the server."""
        if self.split == "validation":
            return None
        rows = [{"questionId": own.question.question_id, "answer": own.prediction} for own in predictions]
        return {f"{self.kind}.json": json.dumps(rows).encode()}


@TASKS.register("docvqa_test")
class DocVqaTestTask(DocVqaTask):
    """DocVQA, test, which a server scores; see `DocVqaTask`.

    Example:
        As there.
    """

    title, kind, split = "DocVQA (test)", "docvqa_test", "test"


@TASKS.register("infovqa")
class InfoVqaTask(DocVqaTask):
    r"""InfographicVQA, validation; see `DocVqaTask`.

    Example:
        ``What percentage have used it?\nAnswer the question using a single word or phrase.`` is answered ``81%``.
    """

    title, kind, data_set = "InfoVQA (val)", "infovqa", "InfographicVQA"
    source = "InfographicVQA: ANLS"
    answer_lengths: ClassVar[Mapping[str, int]] = {"lmms": 32}


@TASKS.register("infovqa_test")
class InfoVqaTestTask(InfoVqaTask):
    """InfographicVQA, test, which a server scores; see `DocVqaTask`.

    Example:
        As there.
    """

    title, kind, split = "InfoVQA (test)", "infovqa_test", "test"
