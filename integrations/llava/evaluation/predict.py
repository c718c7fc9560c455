"""Models that are not ours, asked on the generation loop of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from integrations.llava._text import listed
from integrations.llava.data import is_outside, read_image
from integrations.llava.inference import answer_all
from layerfuse.errors import InputError, MissingFileError

from .task import Question, Task, tasks_of

__all__ = ["Answer", "check_images", "predict", "read_image"]

Answer = Callable[[Sequence[Any], Sequence[str]], Sequence[str]]
"""Answers a batch: per prompt its PIL image, or a list where a question has several or none; as many answers return."""


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
    """Ask a model every question.

    Questions are asked longest prompt first, so that a batch holds prompts of like length, and come back in order.

    Args:
        questions: of any mixture of tasks.
        image_folder: where their images are.
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
