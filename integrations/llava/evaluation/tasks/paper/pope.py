"""POPE: whether an object is in the image, yes or no, with three ways to choose objects that are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from integrations.llava._files import json_lines
from integrations.llava._text import listed
from layerfuse.errors import InputError

from ...metrics.binary import YesNoCounts, read_pope_answer
from ...published_files import existing_file, read_llava_questions
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask
from .prompts import EVAL_ZIP

__all__ = ["PopeTask"]

_ASKED = "pope/llava_pope_test.jsonl"
_IMAGES = "pope/val2014"
_CATEGORIES = ("random", "popular", "adversarial")
_NUMBERS = ("f1", "accuracy", "precision", "recall", "yes_ratio")


@TASKS.register("pope")
class PopeTask(BenchmarkTask):
    """F1 with yes as the positive answer, the mean of the three categories: the paper's number.

    What is no "no" counts as yes (`read_pope_answer`). ``lmms`` wants the whole answer to be yes or no, leaves others
    out of precision and recall, takes one F1 over all questions, and calls the share of questions to be answered yes
    the yes ratio.

    Example:
        ``Is there a snowboard in the image?`` and the sentence that asks for a single word are answered ``Yes``.
    """

    title = "POPE"
    source = "POPE on COCO val2014, LLaVA-1.5's eval_pope.py: mean F1 of three categories"
    question_file = _ASKED
    metric = "f1"
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms": 128}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions, the labels of each category, and the images."""
        where = "output/coco of github.com/AoiDragon/POPE at commit e3e3926"
        return (
            NeededFile(_ASKED, "questions of all categories", EVAL_ZIP),
            *(NeededFile(_labels(name), f"labels, {name}", where) for name in _CATEGORIES),
            NeededFile(_IMAGES, "COCO's val2014 images", "images.cocodataset.org/zips/val2014.zip"),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions, and pair each category's with its labels by position, as the published scorer does.

        Raises:
            ValueError: if numbers or images of questions and labels differ, so that pairs would be wrong.
        """
        asked = read_llava_questions(self, "pope", folder, _ASKED, _IMAGES)
        unknown = sorted({str(own.fields.get("category")) for own in asked} ^ set(_CATEGORIES))
        if unknown:
            raise InputError(
                f"{Path(folder) / _ASKED} lacks or has more than the categories {', '.join(_CATEGORIES)}: "
                f"{', '.join(unknown)}; give the whole file."
            )
        labels = {name: iter(self._paired(name, asked, folder)) for name in _CATEGORIES}
        return [replace(own, answer=next(labels[own.fields["category"]])) for own in asked]

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score yes or no."""
        if self.protocol == "llava":
            return {"accuracy": float(read_pope_answer(answer) == (question.answer == "yes"))}
        return {"accuracy": float(_stripped(answer) == question.answer)}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Sum up each category, and average them; or, as lmms-eval does, all questions at once."""
        if self.protocol == "lmms":
            return _pooled(scores)
        parts = {name: [own for own in scores if own.question.fields["category"] == name] for name in _CATEGORIES}
        counts = {name: _counts(own) for name, own in parts.items() if own}
        means = {number: sum(getattr(own, number) for own in counts.values()) / len(counts) for number in _NUMBERS}
        each = {f"{name}_{number}": getattr(own, number) for name, own in counts.items() for number in _NUMBERS}
        return {**means, **each}

    def _paired(self, name: str, asked: Sequence[Question], folder: str | Path) -> list[str]:
        """Return the labels of a category, in the order of its questions."""
        path = existing_file(self, folder, _labels(name))
        rows = [row for _, row in json_lines(path)]
        own = [each for each in asked if each.fields["category"] == name]
        if len(rows) != len(own):
            raise InputError(
                f"{path} has {len(rows)} labels for {len(own)} questions of category {name}; labels belong to "
                "questions by their order, so get both files of one version."
            )
        pairs = list(zip(own, rows, strict=True))
        moved = [str(each.question_id) for each, row in pairs if Path(each.images[0]).name != row["image"]]
        if moved:
            raise InputError(
                f"{path} has labels of other images than the questions in {len(moved)} of {len(own)} lines, question "
                f"ids {listed(moved, most=10)}; labels belong to questions by their order, so get both files of one "
                "version."
            )
        # As the published scorer: whatever is not "no" is yes.
        return ["no" if row["label"] == "no" else "yes" for row in rows]


def _labels(category: str) -> str:
    return f"pope/coco/coco_pope_{category}.json"


def _stripped(answer: str) -> str:
    return answer.lower().strip()


def _counts(scores: Sequence[ScoredAnswer]) -> YesNoCounts:
    return YesNoCounts.of((read_pope_answer(own.prediction), own.question.answer == "yes") for own in scores)


def _pooled(scores: Sequence[ScoredAnswer]) -> dict[str, float]:
    pairs = [(_stripped(own.prediction), own.question.answer == "yes") for own in scores]
    counts = YesNoCounts.of((said == "yes", right) for said, right in pairs if said in ("yes", "no"))
    return {
        "f1": counts.f1,
        "accuracy": sum(own.scores["accuracy"] for own in scores) / len(scores),
        "precision": counts.precision,
        "recall": counts.recall,
        "yes_ratio": sum(right for _, right in pairs) / len(pairs),
    }
