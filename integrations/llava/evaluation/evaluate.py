"""Evaluate a trained model on a question file: predictions, row by row, and a table of numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from integrations.llava.evaluation.predict import check_images, predict
from integrations.llava.evaluation.scoring import KindScores, ScoredAnswer, score_answers, summarise
from integrations.llava.evaluation.task import read_questions
from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import write_text

__all__ = ["Evaluation", "evaluate", "read_predictions", "write_evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        kinds: question kind -> scores.
        answers: every scored answer, in the order of the question file.
    """

    kinds: Mapping[str, KindScores]
    answers: Sequence[ScoredAnswer]

    def metrics(self) -> dict[str, Any]:
        """JSON-able numbers: per kind, and the mean accuracy over the kinds."""
        kinds = {kind: {"num_questions": own.num_questions, **own.scores} for kind, own in self.kinds.items()}
        mean = sum(own.accuracy for own in self.kinds.values()) / len(self.kinds)
        return {"kinds": kinds, "mean_accuracy": mean, "num_questions": len(self.answers)}


def evaluate(
    model_folder: str | Path,
    questions: str | Path,
    image_folder: str | Path,
    *,
    output: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    device: str | None = None,
) -> Evaluation:
    """Ask a trained model every question of a file, greedily, and score its answers.

    Args:
        model_folder: a folder that training wrote.
        questions: question file, see `integrations.llava.evaluation.task`.
        image_folder: where the images of the questions are.
        output: folder for ``predictions.jsonl`` and ``metrics.json``; nothing is written if None.
        batch_size: questions at a time.
        max_new_tokens: longest answer, in tokens.
        device: torch device; CUDA if there is one, else the CPU.

    Returns:
        Scores and answers.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if the question file is at fault or the folder holds another kind of model.
    """
    # Imported here so that scoring predictions needs no model library.
    from integrations.llava.generate import load_answerer

    asked = read_questions(questions)
    # Before the model is loaded: that can take minutes.
    check_images(asked, image_folder)
    answerer = load_answerer(model_folder, device=device)

    def answer(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        return answerer(images, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)

    answers = score_answers(asked, predict(asked, image_folder, answer, batch_size=batch_size))
    evaluation = Evaluation(kinds=summarise(answers), answers=answers)
    if output is not None:
        write_evaluation(evaluation, output)
    return evaluation


def write_evaluation(evaluation: Evaluation, folder: str | Path) -> None:
    """Write ``predictions.jsonl`` (one row a question) and ``metrics.json``, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps(answer.row(), ensure_ascii=False) + "\n" for answer in evaluation.answers)
    write_text(folder / "predictions.jsonl", "".join(rows))
    write_text(folder / "metrics.json", json.dumps(evaluation.metrics(), indent=1) + "\n")


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """Read a predictions file: JSON lines with ``question_id`` and ``prediction``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is no prediction.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"predictions file {path} does not exist; give the predictions.jsonl of an evaluation.")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number} is not JSON ({error}); expected one JSON object a line."
            ) from error
        if not isinstance(row, dict) or not {"question_id", "prediction"} <= row.keys():
            raise InputError(f"{path}, line {number} lacks question_id or prediction; every row needs both.")
        rows.append(row)
    return rows
