"""OCRBench: a thousand questions about text, from its recognition to handwritten formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from integrations.llava._files import json_lines
from layerfuse.errors import InputError

from ...metrics.ocrbench import CATEGORIES, ocrbench_sums, stands_in_answer
from ...published_files import existing_file, read_published_json
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask

__all__ = ["OcrBenchTask"]

_ASKED = "OCRBench/OCRBench.json"
_ASKED_AS_LINES = "OCRBench/OCRBench.jsonl"
_IMAGES = "OCRBench/OCRBench_Images"
_KEYS = ("dataset_name", "question", "answers", "type", "image_path")
_TYPES = {kind for kinds in CATEGORIES.values() for kind in kinds}


@TASKS.register("ocrbench")
class OcrBenchTask(BenchmarkTask):
    """A right text stands in the answer (`stands_in_answer`); the score is how many of the 1000 do.

    The question is asked as it is: MMFuser's script writes the sentence that asks for a single word into its log only.
    ``lmms`` takes wide characters for narrow ones.

    Example:
        ``what is written in the image?`` is answered ``The image says Centre.``, which is right for ``CENTRE``.
    """

    title = "OCRBench"
    source = "OCRBench, MMFuser's eval_ocrbench.py and convert_ocrbench_for_eval.py: final score"
    question_file = _ASKED
    group = "ocrbench"
    metric = "score"
    parts: ClassVar[Mapping[str, str]] = {
        "recognition": "text recognition",
        "scene_vqa": "scene text VQA",
        "document_vqa": "document VQA",
        "key_information": "key information extraction",
        "handwritten_mathematics": "handwritten formulas",
    }
    shown_as = "points"
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms": 128}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions (as lines, ``OCRBench.jsonl``, they will do, too) and the images."""
        where = "github.com/Yuliang-Liu/MultimodalOCR"
        return (
            NeededFile(_ASKED, "questions and answers", where),
            NeededFile(_IMAGES, "images", f"{where}, OCRBench_Images.zip"),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions; they are numbered from 1, since their own ids repeat."""
        path = Path(folder) / _ASKED_AS_LINES
        if path.is_file():
            rows = [row for _, row in json_lines(path)]
        else:
            path = existing_file(self, folder, _ASKED)
            rows = read_published_json(self, folder, _ASKED)
        if not rows:
            raise InputError(f"{path} holds no question; give the whole file.")
        return [_question(row, number, path) for number, row in enumerate(rows, start=1)]

    def prompt(self, question: Question) -> str:
        """Return the question as it is; lmms-eval strips it."""
        return question.text if self.protocol == "llava" else question.text.strip()

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Look for the right texts in the answer."""
        dataset, narrow = question.fields["dataset_name"], self.protocol == "lmms"
        return {"accuracy": float(stands_in_answer(answer, question.answer, dataset, narrow=narrow))}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Add up the right answers: all, by category of the paper's table, and by type."""
        return ocrbench_sums((own.question.fields["type"], own.scores["accuracy"]) for own in scores)


def _question(row: Mapping[str, Any], number: int, path: Path) -> Question:
    missing = [key for key in _KEYS if key not in row]
    if missing or row["type"] not in _TYPES:
        told = f"lacks {', '.join(missing)}" if missing else f"is of type {row['type']!r}, which OCRBench does not have"
        raise InputError(f"{path}, question {number} {told}; get the file anew.")
    answers = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
    return Question(
        question_id=number,
        image=f"{_IMAGES}/{row['image_path']}",
        text=row["question"],
        kind="ocrbench",
        answer=tuple(map(str, answers)),
        fields={key: row[key] for key in ("dataset_name", "type")},
    )
