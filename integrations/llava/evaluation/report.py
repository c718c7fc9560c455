"""An evaluation as a table for terminals, and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from integrations.llava._files import json_lines
from layerfuse.errors import ExistingFileError, FileAccessError, InputError, MissingFileError
from layerfuse.files import atomic_file, write_text

from .scores import Evaluation
from .task import Task

__all__ = ["evaluation_table", "read_predictions", "refuse_others", "write_evaluation"]

_PREDICTIONS = "predictions.jsonl"


def evaluation_table(evaluation: Evaluation) -> str:
    """Write a line per kind of question: their number, the accuracy in per cent, and the other scores."""
    lines = [f"{'kind':<12}{'questions':>10}  accuracy"]
    for kind, own in evaluation.kinds.items():
        accuracy = f"{100 * own.accuracy:6.1f} %" if "accuracy" in own.scores else " " * 8
        extra = ", ".join(f"{name} {value:.3f}" for name, value in own.scores.items() if name != "accuracy")
        lines.append(f"{kind:<12}{own.num_questions:>10}  {accuracy}  {extra}".rstrip())
    mean = evaluation.metrics().get("mean_accuracy")
    if mean is not None:
        lines.append(f"{'mean':<12}{len(evaluation.answers):>10}  {100 * mean:6.1f} %")
    return "\n".join(lines)


def write_evaluation(
    evaluation: Evaluation, folder: str | Path, *, overwrite: bool = False, task: Task | None = None
) -> None:
    """Write ``predictions.jsonl`` (a row a question), ``metrics.json`` and submissions, each whole or not at all.

    What a server takes stands in ``submission/<kind>/``. The same predictions are always replaced, with their new
    scores; others only with `overwrite`. Of a `task`, its protocol and what it notes, such as the judge, stand beside
    its numbers.

    Raises:
        FileExistsError: if the folder holds other predictions.
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    if not overwrite:
        refuse_others(folder, {answer.question.question_id: answer.prediction for answer in evaluation.answers})
    about = {} if task is None else {"protocol": task.protocol, **({"note": task.note} if task.note else {})}
    rows = (json.dumps(answer.row(), ensure_ascii=False) + "\n" for answer in evaluation.answers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _PREDICTIONS, "".join(rows))
        write_text(folder / "metrics.json", json.dumps({**evaluation.metrics(), **about}, indent=1) + "\n")
        for kind, files in evaluation.submissions.items():
            for name, content in files.items():
                path = folder / "submission" / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path, tidy=True) as file:
                    file.write(content)
    except OSError as error:
        raise FileAccessError(
            f"{folder} cannot be written ({error.strerror or error}); give another output."
        ) from error


def refuse_others(folder: Path, answers: Mapping[int | str, str]) -> None:
    """Raise a FileExistsError if a folder has predictions that are not among these answers, id -> text."""
    path = folder / _PREDICTIONS
    earlier = read_predictions(path) if path.exists() else []
    if any(answers.get(row["question_id"]) != str(row["prediction"]) for row in earlier):
        raise ExistingFileError(
            f"{path} holds other predictions, and is left alone. Give another output, or overwrite it (--overwrite)."
        )


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
    for number, row in json_lines(path):
        if not {"question_id", "prediction"} <= row.keys():
            raise InputError(f"{path}, line {number} lacks question_id or prediction; every row needs both.")
        own_id, prediction = row["question_id"], row["prediction"]
        if not isinstance(own_id, int | str) or not isinstance(prediction, str | int | float):
            raise InputError(
                f"{path}, line {number}: expected numbers or texts as question_id and prediction; got "
                f"{json.dumps(own_id):.40} and {json.dumps(prediction):.40}."
            )
        rows.append(row)
    return rows
