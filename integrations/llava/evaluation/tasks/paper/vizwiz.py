"""VizWiz, test: questions of blind people about their own photographs; a server scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ...metrics.vqa import normalise_vqa_answer
from ...published_files import read_llava_questions
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import ServedTask
from .prompts import EVAL_ZIP, SHORT_ANSWER

__all__ = ["VizWizTask"]

_ASKED = "vizwiz/llava_test.jsonl"
_IMAGES = "vizwiz/test"
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


@TASKS.register("vizwiz")
class VizWizTask(ServedTask):
    """EvalAI challenge 2185 scores, as VQAv2's does; every image has to be answered.

    ``lmms`` writes the question with one capital, and lets answers be 1024 tokens long.

    Example:
        ``What is this?``, ``When the provided information is insufficient, respond with 'Unanswerable'.`` and the
        sentence that asks for a single word are answered ``Unanswerable``, and ``{"image":
        "VizWiz_test_00000000.jpg", "answer": "unanswerable"}`` is sent.
    """

    title = "VizWiz"
    source = "VizWiz-VQA test, EvalAI challenge 2185; questions of LLaVA-1.5"
    question_file = _ASKED
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms": 1024}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions and the images."""
        return (
            NeededFile(_ASKED, "questions of the test set", EVAL_ZIP),
            NeededFile(_IMAGES, "images of the test set", "vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip"),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions of the test set."""
        return read_llava_questions(self, "vizwiz", folder, _ASKED, _IMAGES)

    def prompt(self, question: Question) -> str:
        """Return the question as LLaVA's file has it, or with lmms-eval's capital."""
        if self.protocol == "llava":
            return question.text
        return question.text.partition("\n")[0].capitalize() + _UNANSWERABLE + SHORT_ANSWER

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes]:
        """Return the JSON list that EvalAI takes: names of images and normalised answers."""
        rows = [
            {"image": Path(own.question.images[0]).name, "answer": normalise_vqa_answer(own.prediction)}
            for own in predictions
        ]
        return {"vizwiz_test.json": json.dumps(rows).encode()}
