"""GQA, testdev balanced: compositional questions whose short answer must be equal."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ...published_files import read_llava_questions, read_published_json, refuse_unknown_ids
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask
from .prompts import EVAL_ZIP

__all__ = ["GqaTask"]

_ASKED = "gqa/llava_gqa_testdev_balanced.jsonl"
_ANSWERS = "gqa/data/testdev_balanced_questions.json"
_IMAGES = "gqa/data/images"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@TASKS.register("gqa")
class GqaTask(BenchmarkTask):
    """The answer in lower case, without full stops at its end, equals the right one.

    Open questions (structural type ``query``) and binary ones are counted apart, too. ``lmms`` compares without case
    and without any punctuation. The file for GQA's own ``eval.py --tier testdev_balanced`` is written beside.

    Example:
        ``Is it overcast?`` and the sentence that asks for a single word are answered ``No.``, which is right if the
        answer is ``no``.
    """

    title = "GQA"
    source = "GQA testdev_balanced, eval.py: accuracy; questions of LLaVA-1.5"
    question_file = _ASKED
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms": 16}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions as LLaVA asks them, those with answers, and the images."""
        where = "cs.stanford.edu/people/dorarad/gqa/download.html"
        return (
            NeededFile(_ASKED, "questions of testdev_balanced", EVAL_ZIP),
            NeededFile(_ANSWERS, "their answers", f"{where}, questions1.2.zip"),
            NeededFile(_IMAGES, "images", f"{where}, images.zip"),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions, and the answers from GQA's own file."""
        asked = read_llava_questions(self, "gqa", folder, _ASKED, _IMAGES)
        known: Mapping[str, Any] = read_published_json(self, folder, _ANSWERS)
        refuse_unknown_ids([str(own.question_id) for own in asked], known, Path(folder) / _ANSWERS)
        questions = []
        for own in asked:
            row = known[str(own.question_id)]
            fields = {**own.fields, "structural": row.get("types", {}).get("structural")}
            questions.append(replace(own, answer=str(row["answer"]), fields=fields))
        return questions

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Compare the whole answer."""
        if self.protocol == "llava":
            return {"accuracy": float(_said(answer) == question.answer)}
        said, right = (text.lower().translate(_NO_PUNCTUATION) for text in (answer, question.answer))
        return {"accuracy": float(said == right)}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Sum up all questions, and open and binary ones apart."""
        numbers = super().aggregate(scores)
        parts: dict[str, list[ScoredAnswer]] = {}
        for own in scores:
            structural = own.question.fields.get("structural")
            if structural is not None:
                parts.setdefault("open" if structural == "query" else "binary", []).append(own)
        for name, each in sorted(parts.items()):
            numbers[name] = super().aggregate(each)["accuracy"]
        return numbers

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes]:
        """Return the file that GQA's ``eval.py`` reads."""
        rows = [
            {"questionId": str(own.question.question_id), "prediction": _said(own.prediction)} for own in predictions
        ]
        return {"testdev_balanced_predictions.json": json.dumps(rows).encode()}


def _said(answer: str) -> str:
    return answer.rstrip(".").lower()
