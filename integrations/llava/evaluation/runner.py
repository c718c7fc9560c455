"""Evaluate a trained model on a question file or a task: predictions, row by row, and a table of numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from integrations.llava._files import json_lines
from integrations.llava.inference import Request, SamplingParams, Shard, answer_requests
from layerfuse.errors import ExistingFileError, FileAccessError, InputError, MissingFileError
from layerfuse.files import atomic_file, write_text

from .predict import check_images
from .scores import KindScores, score_answers, summarise
from .task import Question, ScoredAnswer, Task, check_ids, read_questions, tasks_of

__all__ = ["Evaluation", "evaluate", "read_predictions", "score_predictions", "write_evaluation"]

_PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model, and the answers that they come from.

    Attributes:
        kinds: question kind -> scores.
        answers: every scored answer, in the order of the questions.
        submissions: question kind -> files that its server takes, name -> content; no entry where no server scores.
    """

    kinds: Mapping[str, KindScores]
    answers: Sequence[ScoredAnswer]
    submissions: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any]:
        """JSON-able numbers: per kind, and the mean accuracy over the kinds that have one."""
        kinds = {kind: {"num_questions": own.num_questions, **own.scores} for kind, own in self.kinds.items()}
        accuracies = [own.accuracy for own in self.kinds.values() if "accuracy" in own.scores]
        mean = {"mean_accuracy": sum(accuracies) / len(accuracies)} if accuracies else {}
        return {"kinds": kinds, **mean, "num_questions": len(self.answers)}


def score_predictions(
    questions: Sequence[Question], predictions: Iterable[Mapping[str, Any]], *, task: Task | None = None
) -> Evaluation:
    """Score predictions, and sum the scores up.

    Args:
        questions: as `read_questions` or a task's `load` returns them.
        predictions: rows with ``question_id`` and ``prediction``, in any order.
        task: of all questions; None takes the task of each question's kind.

    Returns:
        Scores and answers.

    Raises:
        ValueError: if an answer is missing, comes twice, or belongs to no question.
    """
    answers = score_answers(questions, predictions, task=task)
    submissions = {}
    for kind, own in tasks_of(questions, task).items():
        files = own.submission([answer for answer in answers if answer.question.kind == kind])
        if files is not None:
            submissions[kind] = files
    return Evaluation(summarise(answers, task=task), answers, submissions)


def evaluate(
    model_folder: str | Path,
    questions: str | Path | Task,
    image_folder: str | Path,
    *,
    output: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    device: str | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
) -> Evaluation | None:
    """Ask a trained model every question, greedily, and score its answers.

    Args:
        model_folder: a folder that training wrote.
        questions: a question file; or a task, which loads its questions from `image_folder`.
        image_folder: what names of images are relative to.
        output: folder for ``answers.jsonl``, ``predictions.jsonl``, ``metrics.json``, and submissions for servers.
            Answers are written there as they come, and an evaluation that was interrupted goes on from them. Nothing is
            written if None.
        batch_size: questions at a time.
        max_new_tokens: longest answer, in tokens.
        device: torch device; CUDA if there is one, else the CPU.
        overwrite: ask anew whatever `output` holds.
        shard: which of several processes this is, that answer a share each; None is the only one.

    Returns:
        Scores and answers; None where other processes have questions left, the last of which scores.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        FileExistsError: if `output` holds other predictions.
        OSError: if `output` cannot be written; this is tried before the model is loaded.
        ValueError: if the question file is at fault, a prompt does not fit, the folder holds another kind of model,
            `output` holds answers of another model, to other questions or under other settings, or is None for several
            processes.
    """
    if output is None and shard is not None and shard.count > 1:
        raise InputError(f"{shard.count} processes have no place to put their answers together; give an output.")
    task = questions if isinstance(questions, Task) else None
    asked = questions.load(image_folder) if isinstance(questions, Task) else read_questions(questions)
    check_ids(asked, f"task {type(questions).__name__}")
    check_images(asked, image_folder)
    tasks = tasks_of(asked, task)
    requests = [Request(own.question_id, own.images, tasks[own.kind].prompt(own)) for own in asked]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()) if output is None else output)
        answers, _ = answer_requests(
            requests,
            model_folder,
            folder / "answers.jsonl",
            image_folder=image_folder,
            sampling=SamplingParams(max_new_tokens),
            batch_size=batch_size,
            device=device,
            shard=shard,
            overwrite=overwrite,
            check=None if overwrite else partial(_refuse_others, folder),
        )
        if answers.merge():
            return None
        given = [{"question_id": own_id, "prediction": text} for own_id, text in answers.answers.items()]
        evaluation = score_predictions(asked, given, task=task)
        if output is not None:
            write_evaluation(evaluation, folder, overwrite=True)
    return evaluation


def write_evaluation(evaluation: Evaluation, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write ``predictions.jsonl`` (a row a question), ``metrics.json`` and submissions, each whole or not at all.

    What a server takes stands in ``submission/<kind>/``.

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
        for kind, files in evaluation.submissions.items():
            for name, content in files.items():
                path = folder / "submission" / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as file:
                    file.write(content)
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
