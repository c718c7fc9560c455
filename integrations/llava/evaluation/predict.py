"""The one generation loop that all tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from integrations.llava.evaluation.task import TASKS, Question
from integrations.llava.images import read_image
from layerfuse.errors import InputError, MissingFileError

__all__ = ["Answer", "check_images", "predict", "read_image"]

Answer = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str]]
"""Answers a batch: images and prompts of equal number give as many answers."""


def check_images(questions: Sequence[Question], image_folder: str | Path) -> None:
    """Check that every image of the questions is there, before a model is loaded.

    Raises:
        FileNotFoundError: naming the first missing files and their number.
        ValueError: naming those that are outside the folder, likewise.
    """
    # Imported here so that whoever only scores answers needs no model library.
    from integrations.llava.data.media_names import is_outside

    folder = Path(image_folder)
    names = dict.fromkeys(question.image for question in questions)
    outside = [name for name in names if is_outside(name, folder)]
    if outside:
        raise InputError(
            f"{len(outside)} of {len(names)} images are outside the image folder {folder}: {', '.join(outside[:10])}"
            f"{', …' if len(outside) > 10 else ''}. Give names inside it; for absolute names, / as the folder."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{len(missing)} of {len(names)} images are missing in {folder}: {', '.join(missing[:10])}"
            f"{', …' if len(missing) > 10 else ''}. Give the folder that the question file's names are relative to."
        )


def predict(
    questions: Sequence[Question], image_folder: str | Path, answer: Answer, *, batch_size: int = 32
) -> list[dict[str, Any]]:
    """Ask a model every question.

    Questions are asked longest prompt first, so that a batch holds prompts of like length, and come back in order.

    Args:
        questions: of any mixture of tasks.
        image_folder: where their images are.
        answer: the model.
        batch_size: questions at a time.

    Returns:
        Rows ``{"question_id", "prediction"}``, in the order of the questions.

    Raises:
        ValueError: if the batch size is below 1, an image cannot be read, or the model returns another number of
            answers than it was asked questions.
        FileNotFoundError: if an image is missing.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is too small; ask at least 1 question at a time.")
    check_images(questions, image_folder)
    prompts = [TASKS.get(question.kind)().prompt(question) for question in questions]
    order = sorted(range(len(questions)), key=lambda index: -len(prompts[index]))
    answers: dict[int, str] = {}
    with tqdm(total=len(order), desc="answers", unit="question", disable=None, leave=False) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            images = [read_image(Path(image_folder) / questions[index].image) for index in batch]
            given = list(answer(images, [prompts[index] for index in batch]))
            if len(given) != len(batch):
                raise InputError(f"the model gave {len(given)} answers to {len(batch)} questions; expected one each.")
            answers.update(zip(batch, given, strict=True))
            progress.update(len(batch))
    return [
        {"question_id": question.question_id, "prediction": answers[index]} for index, question in enumerate(questions)
    ]
