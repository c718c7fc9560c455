"""MMMU, validation: college questions of thirty subjects, most with lettered options, some with several pictures.

Layout: ``hf download --repo-type dataset MMMU/MMMU --local-dir DATA/mmmu``: a folder per subject of parquet files
``validation-*.parquet``: id, question, options (a list written as Python does), answer, question_type, image_1 to
image_7.

Source: Yue et al., "MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark for Expert AGI",
CVPR 2024; MMFuser's ``llava/eval/mmmu``, which is MMMU's own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from integrations.llava._text import listed
from layerfuse.errors import InputError

from ...metrics.open_answers import open_answer_is_right
from ...metrics.option_letters import mmmu_letter
from ...option_lines import lettered, option_lines
from ...published_files import parquet_rows
from ...table_pictures import stored_picture, table_picture
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask
from .prompts import OPTION_LETTER, SHORT_ANSWER

__all__ = ["MmmuTask"]

_FILES = "mmmu/*/validation-*.parquet"
_PICTURES = tuple(f"image_{number}" for number in range(1, 8))
_COLUMNS = ("id", "question", "options", "answer", "question_type", *_PICTURES)
_DISCIPLINES = {
    "art and design": "Art Art_Theory Design Music",
    "business": "Accounting Economics Finance Manage Marketing",
    "science": "Biology Chemistry Geography Math Physics",
    "health and medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "humanities and social science": "History Literature Sociology Psychology",
    "tech and engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
_DISCIPLINE_OF = {subject: name for name, subjects in _DISCIPLINES.items() for subject in subjects.split()}


@TASKS.register("mmmu")
class MmmuTask(BenchmarkTask):
    r"""The letter that MMMU's parser finds, or an open answer that holds a right one; an unread letter is a guess.

    The guess is the same each time, by the question's id. Answers are greedy here, where the published script samples
    (temperature 1, 5 beams), so that ``llava`` is not as published. It shows the first picture only, ``lmms`` all that
    question and options name; ``<image 1>`` stays in the text, as there.

    Example:
        ``Which is <image 1>?\n(A) a\n(B) b\n\nAnswer with the option's letter from the given choices directly.`` is
        answered ``(B)``.
    """

    title = "MMMU (val)"
    source = "MMMU: accuracy by its parser"
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms": 16}

    @property
    def note(self) -> str:
        """What differs from the published numbers."""
        return "greedy, not as published" if self.protocol == "llava" else ""

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the parquet files of all subjects, which hold the pictures, too."""
        return (NeededFile(_FILES, "questions and pictures, a folder per subject", "Hugging Face, MMMU/MMMU"),)

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions of all subjects, and store their pictures as files."""
        questions = [self._question(row, folder) for row in parquet_rows(self, folder, _FILES, _COLUMNS)]
        missing = sorted(set(_DISCIPLINE_OF) - {_subject(own) for own in questions})
        if missing:
            raise InputError(
                f"{Path(folder) / _FILES} lacks {len(missing)} of {len(_DISCIPLINE_OF)} subjects: "
                f"{listed(missing, most=10)}. Give the files of all."
            )
        return questions

    def _question(self, row: Mapping[str, Any], folder: str | Path) -> Question:
        own_id = str(row["id"])
        place = f"MMMU's question {own_id}"
        options = _texts(row["options"])
        if row["question_type"] == "multiple-choice" and len(options) < 2:
            raise InputError(f"{place} has the options {row['options']!r:.80}; get the files anew.")
        shown = _PICTURES[:1]
        if self.protocol == "lmms":
            named = re.findall(r"<image (\d)>", " ".join([row["question"], *options]))
            shown = tuple(f"image_{number}" for number in sorted(set(named)))
        names = tuple(
            stored_picture(folder, "mmmu", table_picture(row[column], f"{place}, {column},")) for column in shown
        )
        is_choice = row["question_type"] == "multiple-choice"
        right = row["answer"] if is_choice else tuple(self._right(str(row["answer"])))
        return Question(
            question_id=own_id,
            image=names[0] if len(names) == 1 else names,
            text=row["question"],
            kind="mmmu",
            answer=right,
            fields={"options": options if is_choice else []},
        )

    def _right(self, text: str) -> list[str]:
        """Right answers to an open question; lmms-eval does not take a written list apart."""
        return _texts(text) if self.protocol == "llava" and text.startswith("[") else [text]

    def prompt(self, question: Question) -> str:
        """Return the question, its options, and what kind of answer is wanted."""
        options = lettered(question.fields["options"])
        if not options:
            return question.text + ("\n" if self.protocol == "lmms" else "") + SHORT_ANSWER
        form = "({}) {}" if self.protocol == "llava" else "{}. {}"
        return question.text + option_lines(options, form) + "\n" + OPTION_LETTER

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a letter, or an open answer."""
        options = lettered(question.fields["options"])
        if not options:
            return {"accuracy": float(open_answer_is_right(answer, question.answer))}
        letter = mmmu_letter(answer, options, seed=str(question.question_id), loosely=self.protocol == "lmms")
        return {"accuracy": float(letter == question.answer)}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Average over all questions, and over those of each discipline."""
        parts: dict[str, list[float]] = {}
        for own in scores:
            subject = _subject(own.question)
            parts.setdefault(_DISCIPLINE_OF.get(subject, subject), []).append(own.scores["accuracy"])
        return {**super().aggregate(scores), **{name: sum(own) / len(own) for name, own in sorted(parts.items())}}


def _subject(question: Question) -> str:
    """What stands between split and number in an id such as validation_Art_Theory_3."""
    return re.sub(r"^[^_]*_|_\d+$", "", str(question.question_id))


def _texts(written: Any) -> list[str]:
    """A list of texts, from a list or from one written as Python does."""
    if isinstance(written, str):
        try:
            written = ast.literal_eval(written)
        except (ValueError, SyntaxError):
            written = [written]
    return [str(one) for one in written] if isinstance(written, list | tuple) else [str(written)]
