"""ScienceQA, test: multiple choice over school books; the questions that have an image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from layerfuse.errors import InputError

from ...metrics.science_qa import read_science_qa_answer, read_science_qa_answer_of_lmms
from ...published_files import read_published_json, refuse_unknown_ids
from ...task import TASKS, NeededFile, Question
from .benchmark import BenchmarkTask
from .prompts import EVAL_ZIP, OPTION_LETTER

__all__ = ["ScienceQaTask"]

_ASKED = "scienceqa/llava_test_CQM-A.json"
_PROBLEMS = "scienceqa/problems.json"
_IMAGES = "scienceqa/images/test"
_LETTERS = "ABCDEFGHIJ"


@TASKS.register("scienceqa")
class ScienceQaTask(BenchmarkTask):
    """The letter that is read in the answer (`read_science_qa_answer`) is the right one; IMG accuracy.

    ``lmms`` asks in another form, and takes any capital with a full stop behind it.

    Example:
        ``Context: N/A``, ``Question: Which bird is it?``, ``Options: (A) gull (B) owl`` and the sentence that asks
        for the letter are answered ``B``; ``B. owl`` and ``The answer is B.`` are right, too, ``(B)`` is not.
    """

    title = "SQA-IMG"
    source = "ScienceQA test, LLaVA-1.5's eval_science_qa.py: IMG-Accuracy"
    question_file = _ASKED
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 1024, "lmms": 16}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions as LLaVA asks them, the problems with their answers, and the images."""
        where = "data/scienceqa of github.com/lupantech/ScienceQA"
        return (
            NeededFile(_ASKED, "questions of the test set", EVAL_ZIP),
            NeededFile(_PROBLEMS, "problems with their answers", where),
            NeededFile(_IMAGES, "images of the test set", where),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions of the test set that have an image."""
        path = Path(folder) / _ASKED
        rows = read_published_json(self, folder, _ASKED)
        shown = [row for row in rows if row.get("image")]
        if not shown:
            raise InputError(f"{path} holds no question with an image; give the whole file.")
        problems = read_published_json(self, folder, _PROBLEMS)
        refuse_unknown_ids([str(row["id"]) for row in shown], problems, Path(folder) / _PROBLEMS)
        return [self._question(row, problems[str(row["id"])]) for row in shown]

    def prompt(self, question: Question) -> str:
        """Return the question of LLaVA's file, or in lmms-eval's form, and the sentence that asks for the letter."""
        if self.protocol == "llava":
            return question.text + OPTION_LETTER
        fields = question.fields
        hint = f"Context: {fields['hint']}\n" if fields["hint"] else ""
        choices = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, fields["choices"], strict=False)]
        return hint + "\n".join([fields["question"], *choices]) + OPTION_LETTER

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score the letter that is read; none is wrong."""
        if self.protocol == "llava":
            letter = read_science_qa_answer(answer, len(question.fields["choices"]))
        else:
            letter = read_science_qa_answer_of_lmms(answer)
        return {"accuracy": float(letter == question.answer)}

    def _question(self, row: Mapping[str, Any], problem: Mapping[str, Any]) -> Question:
        return Question(
            question_id=str(row["id"]),
            image=f"{_IMAGES}/{row['image']}",
            text=row["conversations"][0]["value"].replace("<image>", "").strip(),
            kind="scienceqa",
            answer=_LETTERS[problem["answer"]],
            fields={key: problem[key] for key in ("question", "choices", "hint")},
        )
