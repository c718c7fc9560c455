"""MMStar: 1500 questions that cannot be answered without looking, with lettered options in their text.

Layout: ``hf download --repo-type dataset Lin-Chen/MMStar --local-dir DATA/mmstar``: ``mmstar.parquet`` of ``index``,
``question`` (options within), ``image``, ``answer`` (a letter), ``category`` and ``l2_category``.

Source: Chen et al., "Are We on the Right Way for Evaluating Large Vision-Language Models?", NeurIPS 2024; lmms-eval's
``mmstar``, whose average is that of the eighteen detailed categories, where MMStar's is that of the six.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ...metrics.option_letters import mmstar_letter, mmstar_letter_of_lmms
from ...published_files import parquet_rows
from ...table_pictures import stored_picture, table_picture
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from ..paper.benchmark import BenchmarkTask
from ..paper.prompts import OPTION_LETTER

__all__ = ["MmStarTask"]

_FILES = "mmstar/*.parquet"
_COLUMNS = ("index", "question", "image", "answer", "category", "l2_category")
_YES_OR_NO = " Please answer yes or no."


@TASKS.register("mmstar")
class MmStarTask(BenchmarkTask):
    r"""The letter that lmms-eval's rule finds, under ``official`` MMStar's; the mean over categories, eighteen or six.

    Example:
        ``Which is it?\nOptions: A: dog, B: cat\nAnswer with the option's letter from the given choices directly`` (no
        full stop behind it) is answered ``B``.
    """

    title = "MMStar"
    source = "MMStar: mean accuracy of its categories"
    group = "extra"
    protocols = ("lmms", "official")
    answer_lengths: ClassVar[Mapping[str, int]] = {"lmms": 1024, "official": 1024}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the parquet file."""
        return (NeededFile(_FILES, "questions and images", "Hugging Face, Lin-Chen/MMStar"),)

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions, and store their images as files."""
        questions = []
        for row in parquet_rows(self, folder, _FILES, _COLUMNS):
            image = stored_picture(folder, "mmstar", table_picture(row["image"], f"MMStar's question {row['index']}"))
            fields = {name: str(row[name]) for name in ("category", "l2_category")}
            right = str(row["answer"]).strip().upper()
            questions.append(Question(int(row["index"]), image, row["question"], "mmstar", right, fields))
        return questions

    def prompt(self, question: Question) -> str:
        """Return the question with its options, and what asks for the letter."""
        text = question.text.strip().replace(_YES_OR_NO, "") if self.protocol == "lmms" else question.text.strip()
        return text + OPTION_LETTER.removesuffix(".")

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a letter."""
        read = mmstar_letter_of_lmms if self.protocol == "lmms" else mmstar_letter
        return {"accuracy": float(read(answer) == question.answer)}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Average the accuracies of categories; those of the six stand beside."""
        averaged = _by(scores, "l2_category" if self.protocol == "lmms" else "category")
        return {"accuracy": sum(averaged.values()) / len(averaged), **_by(scores, "category")}


def _by(scores: Sequence[ScoredAnswer], field: str) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for own in scores:
        parts.setdefault(own.question.fields[field], []).append(own.scores["accuracy"])
    return {name: sum(own) / len(own) for name, own in sorted(parts.items())}
