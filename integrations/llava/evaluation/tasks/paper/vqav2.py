"""VQAv2, test-dev: short answers to open questions; a server scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from layerfuse.errors import InputError

from ...metrics.vqa import normalise_vqa_answer
from ...published_files import read_llava_questions, refuse_unknown_ids
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import ServedTask
from .prompts import EVAL_ZIP

__all__ = ["VqaV2Task"]

_ASKED = "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"
_ALL = "vqav2/llava_vqav2_mscoco_test2015.jsonl"
_IMAGES = "vqav2/test2015"


@TASKS.register("vqav2")
class VqaV2Task(ServedTask):
    """EvalAI challenge 830 scores: per person min(others who said so / 3, 1), the mean over ten people.

    The server wants every question of test2015; those that are not of test-dev are answered with nothing. Answers are
    normalised (`normalise_vqa_answer`) before they are sent, as LLaVA does.

    Example:
        ``Is the ball flying towards the batter?`` and the sentence that asks for a single word are answered ``Yes``,
        and ``{"question_id": 262144000, "answer": "yes"}`` is sent.
    """

    title = "VQAv2"
    source = "VQA v2.0 test-dev, EvalAI challenge 830; questions of LLaVA-1.5"
    question_file = _ASKED
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms": 16}
    _all_ids: Sequence[int | str] = ()

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions that are asked, those that the server wants, and the images."""
        return (
            NeededFile(_ASKED, "questions of test-dev2015", EVAL_ZIP),
            NeededFile(_ALL, "questions of test2015, whose ids the server wants", EVAL_ZIP),
            NeededFile(_IMAGES, "COCO's test2015 images", "images.cocodataset.org/zips/test2015.zip"),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions of test-dev, and the ids of all of test2015."""
        asked = read_llava_questions(self, "vqav2", folder, _ASKED, _IMAGES)
        self._all_ids = [own.question_id for own in read_llava_questions(self, "vqav2", folder, _ALL, _IMAGES)]
        refuse_unknown_ids([own.question_id for own in asked], self._all_ids, Path(folder) / _ALL)
        return asked

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes]:
        """Return the JSON list that EvalAI takes, with all ids of test2015."""
        if not self._all_ids:
            raise InputError("the ids of test2015 are not known; load the questions with this task object first.")
        said = {own.question.question_id: normalise_vqa_answer(own.prediction) for own in predictions}
        rows = [{"question_id": own_id, "answer": said.get(own_id, "")} for own_id in self._all_ids]
        return {"vqav2_test-dev2015.json": json.dumps(rows).encode()}
