"""SEED-Bench: lettered options about images, and about frames of videos.

Layout: LLaVA's ``seed_bench/llava-seed-bench.jsonl`` (questions, options and the sentence that asks for the letter),
``seed_bench/SEED-Bench.json`` (right letters, ``data_type`` image or video, types of questions), images and the middle
frames of videos in folders of ``seed_bench`` that the questions name.

Source: Li et al., "SEED-Bench: Benchmarking Multimodal LLMs with Generative Comprehension", CVPR 2024; LLaVA's
``convert_seed_for_submission``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from integrations.llava._text import listed
from layerfuse.errors import InputError

from ...published_files import existing_file, read_llava_questions, read_published_json
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask
from .prompts import EVAL_ZIP

__all__ = ["SeedBenchImageTask", "SeedBenchTask"]

_ASKED = "seed_bench/llava-seed-bench.jsonl"
_ANSWERS = "seed_bench/SEED-Bench.json"
_IMAGES = "seed_bench"


@TASKS.register("seedbench")
class SeedBenchTask(BenchmarkTask):
    r"""The answer is the right letter and nothing else; under ``lmms`` its first character counts.

    Images and videos apart, and each type of question, stand beside. The paper's 58.6 of LLaVA-1.5 is over all.

    Example:
        ``Which object is largest?\nA. …\nD. …\nAnswer with the option's letter from the given choices directly.`` is
        answered ``C``; ``C.`` is wrong.
    """

    title = "SEED-Bench"
    source = "SEED-Bench: the exact letter"
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms": 1024}
    question_file = _ASKED
    parts: ClassVar[Mapping[str, str]] = {"image": "images only"}
    kind: ClassVar[str] = "seedbench"
    data_types: ClassVar[tuple[str, ...]] = ("image", "video")

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions, the right answers, and the images."""
        return (
            NeededFile(_ASKED, "questions", EVAL_ZIP),
            NeededFile(_ANSWERS, "right answers and types", "Hugging Face, AILab-CVC/SEED-Bench"),
            NeededFile(f"{_IMAGES}/SEED-Bench-image", "images", "Hugging Face, AILab-CVC/SEED-Bench"),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read questions and right answers; either without the other is an error."""
        asked = {str(own.question_id): own for own in read_llava_questions(self, self.kind, folder, _ASKED, _IMAGES)}
        content = read_published_json(self, folder, _ANSWERS)
        path = existing_file(self, folder, _ANSWERS)
        rows, names = _rows(content, path)
        missing = [key for key in rows if key not in asked and rows[key]["data_type"] in self.data_types]
        unknown = [key for key in asked if key not in rows]
        if missing or unknown:
            raise InputError(
                f"{path} and {_ASKED} differ: {len(missing)} questions are not asked ({listed(missing, most=10)}), "
                f"{len(unknown)} have no right answer ({listed(unknown, most=10)}). Give both whole."
            )
        return [
            replace(
                own,
                answer=rows[key]["answer"],
                fields={
                    "data_type": rows[key]["data_type"],
                    "question_type": names.get(rows[key]["question_type_id"], str(rows[key]["question_type_id"])),
                },
            )
            for key, own in asked.items()
            if rows[key]["data_type"] in self.data_types
        ]

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a letter."""
        said = answer.strip()[:1] if self.protocol == "lmms" else answer
        return {"accuracy": float(said == question.answer)}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Sum up all, images, videos, and each type."""
        numbers = super().aggregate(scores)
        parts: dict[str, list[float]] = {}
        for own in scores:
            for name in (own.question.fields["data_type"], own.question.fields["question_type"]):
                parts.setdefault(name, []).append(own.scores["accuracy"])
        return {**numbers, **{name: sum(parts[name]) / len(parts[name]) for name in sorted(parts)}}

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes] | None:
        """Return the file for the leaderboard, which wants all questions."""
        if len(self.data_types) == 1:
            return None
        rows = [{"question_id": own.question.question_id, "prediction": own.prediction} for own in predictions]
        return {"seed_bench.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


@TASKS.register("seedbench_image")
class SeedBenchImageTask(SeedBenchTask):
    """SEED-Bench's questions about images; see `SeedBenchTask`.

    Example:
        As there.
    """

    title = "SEED-Bench (image)"
    parts: ClassVar[Mapping[str, str]] = {}
    kind = "seedbench_image"
    data_types = ("image",)


def _rows(content: Any, path: Path) -> tuple[dict[str, Mapping[str, Any]], dict[Any, str]]:
    """Rows of questions by id, and names of types by number."""
    wanted = ("question_id", "answer", "data_type", "question_type_id")
    questions = content.get("questions") if isinstance(content, dict) else None
    whole = isinstance(questions, list) and all(
        isinstance(row, dict) and all(key in row for key in wanted) for row in questions
    )
    if not questions or not whole:
        raise InputError(f"{path} lacks questions with {', '.join(wanted)}; get it anew.")
    return {str(row["question_id"]): row for row in questions}, {
        number: name for name, number in content.get("question_type", {}).items()
    }
