"""Ask a model every question, ours or another, on the generation loop of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from integrations.llava._text import listed
from integrations.llava.data import is_outside, read_image
from integrations.llava.inference import ReadModel, Request, SamplingParams, Shard, answer_all, answer_requests
from layerfuse.errors import InputError, MissingFileError

from .report import refuse_others, write_evaluation
from .scores import Evaluation, score_predictions
from .task import Question, Task, check_ids, read_questions, tasks_of

__all__ = ["Answer", "check_images", "evaluate", "evaluate_loaded", "predict", "read_image"]

_LONGEST = 32

Answer = Callable[[Sequence[Any], Sequence[str]], Sequence[str]]
"""Answers a batch: per prompt its PIL image, or a list where a question has several or none; as many answers return."""


def evaluate(
    model_folder: str | Path,
    questions: str | Path | Task,
    image_folder: str | Path,
    *,
    output: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    device: str | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
    num_workers: int | None = None,
    compile: bool = False,
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
        max_new_tokens: longest answer, in tokens; None takes the task's, or 32 where it says none.
        stop: texts in front of which answers end.
        device: torch device; CUDA if there is one, else the CPU.
        overwrite: ask anew whatever `output` holds.
        shard: which of several processes this is, that answer a share each; None is the only one.
        num_workers: processes that prepare images, see `Predictor.asker`.
        compile: whether decoding is compiled, see `Predictor`.

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
    asked = questions.load(image_folder) if isinstance(questions, Task) else read_questions(questions)
    check_ids(asked, f"task {type(questions).__name__}")
    check_images(asked, image_folder)
    return evaluate_loaded(
        model_folder,
        asked,
        image_folder,
        task=questions if isinstance(questions, Task) else None,
        output=output,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        stop=stop,
        device=device,
        overwrite=overwrite,
        shard=shard,
        num_workers=num_workers,
        compile=compile,
    )


def evaluate_loaded(
    model_folder: str | Path,
    asked: Sequence[Question],
    image_folder: str | Path,
    *,
    task: Task | None,
    output: str | Path | None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    device: str | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
    num_workers: int | None = None,
    compile: bool = False,
    read: ReadModel | None = None,
) -> Evaluation | None:
    """Ask and score as `evaluate` does, questions that were loaded and checked already.

    `task` is the object that loaded them, None if they are a file's; `read` keeps the model for further ones.
    """
    told = max_new_tokens if max_new_tokens is not None or task is None else task.max_new_tokens
    longest = _LONGEST if told is None else told
    tasks = tasks_of(asked, task)
    requests = [Request(own.question_id, own.images, tasks[own.kind].prompt(own)) for own in asked]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()) if output is None else output)
        answers, _ = answer_requests(
            requests,
            model_folder,
            folder / "answers.jsonl",
            image_folder=image_folder,
            sampling=SamplingParams(longest, stop=tuple(stop)),
            batch_size=batch_size,
            device=device,
            compile=compile,
            num_workers=num_workers,
            shard=shard,
            overwrite=overwrite,
            check=None if overwrite else partial(refuse_others, folder),
            read=read,
        )
        if answers.merge():
            return None
        given = [{"question_id": own_id, "prediction": text} for own_id, text in answers.answers.items()]
        evaluation = score_predictions(asked, given, task=task)
        if output is not None:
            write_evaluation(evaluation, folder, overwrite=True, task=task)
    return evaluation


def check_images(questions: Sequence[Question], image_folder: str | Path) -> None:
    """Check that every image of the questions is there, before a model is loaded.

    Raises:
        FileNotFoundError: naming the first missing files and their number.
        ValueError: naming those that are outside the folder, likewise.
    """
    folder = Path(image_folder)
    names = dict.fromkeys(name for question in questions for name in question.images)
    outside = [name for name in names if is_outside(name, folder)]
    if outside:
        raise InputError(
            f"{len(outside)} of {len(names)} images are outside the image folder {folder}: {listed(outside, most=10)}. "
            "Give names inside it; for absolute names, / as the folder."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{len(missing)} of {len(names)} images are missing in {folder}: {listed(missing, most=10)}. "
            "Give the folder that the question file's names are relative to."
        )


def predict(
    questions: Sequence[Question],
    image_folder: str | Path,
    answer: Answer,
    *,
    batch_size: int = 32,
    task: Task | None = None,
) -> list[dict[str, Any]]:
    """Ask a model that is not ours every question, the longest prompts first.

    Args:
        questions: of any mixture of tasks.
        image_folder: what names of images are relative to.
        answer: the model.
        batch_size: questions at a time.
        task: of all questions; None takes the task of each question's kind.

    Returns:
        Rows ``{"question_id", "prediction"}``, in the order of the questions.

    Raises:
        ValueError: if the batch size is below 1, an image cannot be read, or the model returns another number of
            answers than it was asked questions.
        FileNotFoundError: if an image is missing.
    """
    check_images(questions, image_folder)
    tasks = tasks_of(questions, task)
    prompts = [tasks[question.kind].prompt(question) for question in questions]

    def ask(batches: Sequence[Sequence[int]]) -> Iterator[Sequence[str]]:
        for batch in batches:
            opened = [[read_image(Path(image_folder) / name) for name in questions[index].images] for index in batch]
            images = [own[0] if len(own) == 1 else own for own in opened]
            yield list(answer(images, [prompts[index] for index in batch]))

    answers = answer_all(ask, [len(prompt) for prompt in prompts], batch_size)
    return [{"question_id": own.question_id, "prediction": text} for own, text in zip(questions, answers, strict=True)]
