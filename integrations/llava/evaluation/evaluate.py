"""Evaluate a trained model on a question file: predictions, row by row, and a table of numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from integrations.llava.evaluation.predict import check_images
from integrations.llava.evaluation.scoring import KindScores, ScoredAnswer, score_answers, summarise
from integrations.llava.evaluation.task import TASKS, read_questions
from integrations.llava.json_lines import json_lines
from layerfuse.errors import ExistingFileError, FileAccessError, InputError, MissingFileError
from layerfuse.files import write_text

__all__ = ["Evaluation", "evaluate", "read_predictions", "write_evaluation"]

_PREDICTIONS = "predictions.jsonl"


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
    overwrite: bool = False,
) -> Evaluation:
    """Ask a trained model every question of a file, greedily, and score its answers.

    Args:
        model_folder: a folder that training wrote.
        questions: question file, see `integrations.llava.evaluation.task`.
        image_folder: where the images of the questions are.
        output: folder for ``answers.jsonl``, ``predictions.jsonl`` and ``metrics.json``. Answers are written there as
            they come, and an evaluation that was interrupted goes on from them. Nothing is written if None.
        batch_size: questions at a time.
        max_new_tokens: longest answer, in tokens.
        device: torch device; CUDA if there is one, else the CPU.
        overwrite: ask anew whatever `output` holds.

    Returns:
        Scores and answers.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        FileExistsError: if `output` holds other predictions.
        OSError: if `output` cannot be written; this is tried before the model is loaded.
        ValueError: if the question file is at fault, a prompt does not fit, the folder holds another kind of model, or
            `output` holds answers of another model, to other questions or under other settings.
    """
    # Imported here so that scoring predictions needs no model library.
    from integrations.llava.answer_files import AnswerFile, Shard, answer_settings
    from integrations.llava.batch_answers import answer_into, form_batches
    from integrations.llava.decoding import Decoding
    from integrations.llava.generate import default_dtype, load_answerer, usable_device
    from integrations.llava.preparing import load_preparer
    from integrations.llava.request_files import Request, prompt_lengths, question_fingerprints

    asked = read_questions(questions)
    check_images(asked, image_folder)
    requests = [Request(own.question_id, (own.image,), TASKS.get(own.kind)().prompt(own)) for own in asked]
    preparer, decoding, where = load_preparer(model_folder), Decoding(max_new_tokens), usable_device(device)
    lengths = prompt_lengths(requests, preparer, image_folder=image_folder, max_new_tokens=max_new_tokens)
    batches = form_batches(lengths, batch_size, Shard())
    dtype = default_dtype(model_folder, where)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()) if output is None else output)
        answers = AnswerFile(
            folder / "answers.jsonl",
            requests,
            fingerprints=question_fingerprints(requests, image_folder),
            model_id=Path(model_folder).resolve().name,
            metadata=answer_settings(model_folder, preparer, dtype=dtype, quantize="none", decoding=decoding),
            shard=Shard(),
            overwrite=overwrite,
        )
        if not overwrite:
            _refuse_others(folder, answers.answers)
        load = partial(load_answerer, model_folder, device=where, dtype=dtype)
        answer_into(answers, load, batches, image_folder=image_folder, decoding=decoding)
        answers.merge()
        given = [{"question_id": own_id, "prediction": text} for own_id, text in answers.answers.items()]
        scored = score_answers(asked, given)
        evaluation = Evaluation(kinds=summarise(scored), answers=scored)
        if output is not None:
            write_evaluation(evaluation, folder, overwrite=True)
    return evaluation


def write_evaluation(evaluation: Evaluation, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write ``predictions.jsonl`` (one row a question) and ``metrics.json``, each whole or not at all.

    Args:
        evaluation: what was found.
        folder: made if need be.
        overwrite: replace other predictions. The same ones are always replaced, with their new scores.

    Raises:
        FileExistsError: if the folder holds other predictions.
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    if not overwrite:
        _refuse_others(folder, {answer.question.question_id: answer.prediction for answer in evaluation.answers})
    rows = (json.dumps(answer.row(), ensure_ascii=False) + "\n" for answer in evaluation.answers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _PREDICTIONS, "".join(rows))
        write_text(folder / "metrics.json", json.dumps(evaluation.metrics(), indent=1) + "\n")
    except OSError as error:
        raise FileAccessError(
            f"{folder} cannot be written ({error.strerror or error}); give another output."
        ) from error


def _refuse_others(folder: Path, answers: Mapping[int | str, str]) -> None:
    """Refuse to replace predictions that are not among these answers."""
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
