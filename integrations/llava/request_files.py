"""Files of questions to be answered: read, and checked before a model is loaded.

A row is `{"id": …, "image": "name.jpg" | ["a.jpg", …] (optional), "prompt": text}`, one a line (jsonl) or in one JSON
list. `question_id` and `text`, as LLaVA's question files have them, mean the same as `id` and `prompt`. Instead of a
prompt a row may have `conversations` in LLaVA's format: earlier turns are read, the human's last one is answered, and
an answer behind it, as training data have, is not shown to the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfuse.errors import InputError

from .data import read_samples
from .images import find_broken_images
from .preparing import Preparer, Prompt
from .wording import bulleted

__all__ = ["Request", "prompt_lengths", "read_requests", "refuse_broken_images"]

# What a row may call its id, and its question.
_IDS = ("id", "question_id")
_PROMPTS = ("prompt", "text", "conversations")


@dataclass(frozen=True)
class Request:
    """A question that waits for its answer.

    Attributes:
        id: unique in its file.
        images: names of its images, relative to the image folder.
        prompt: the question, or a conversation that ends with it.
    """

    id: int | str
    images: tuple[str, ...]
    prompt: Prompt

    @property
    def question(self) -> str:
        """The human's last words."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["value"]


def read_requests(path: str | Path) -> list[Request]:
    """Read a file of questions.

    Args:
        path: jsonl or json, see above.

    Returns:
        The questions, in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, a row is no question, or an id occurs twice; the rows at fault are listed.
    """
    rows = read_samples(path)
    requests: list[Request] = []
    problems: list[str] = []
    places: dict[int | str, str] = {}
    for index in range(len(rows)):
        try:
            request = _parse(rows[index])
        except ValueError as error:
            problems.append(f"{rows.place(index)}: {error}")
            continue
        if request.id in places:
            problems.append(f"{rows.place(index)}: id {request.id!r} was used in {places[request.id]}")
        places.setdefault(request.id, rows.place(index))
        requests.append(request)
    _refuse(problems, str(path))
    return requests


def prompt_lengths(requests: Sequence[Request], preparer: Preparer) -> list[int]:
    """Write every prompt out.

    Args:
        requests: the questions.
        preparer: of the model that shall answer.

    Returns:
        Positions that each takes up, images included.

    Raises:
        ValueError: listing the questions that the model cannot be asked.
    """
    lengths: list[int] = []
    problems: list[str] = []
    for request in requests:
        try:
            lengths.append(len(preparer.encode(request.prompt, len(request.images))))
        except ValueError as error:
            problems.append(f"id {request.id!r}: {error}")
    _refuse(problems, "the questions")
    return lengths


def refuse_broken_images(requests: Iterable[Request], image_folder: str | Path) -> None:
    """Decode every image of the questions.

    Raises:
        ValueError: listing the files that are missing or broken.
    """
    _refuse(find_broken_images(image_folder, (name for own in requests for name in own.images)), str(image_folder))


def _refuse(problems: Sequence[str], place: str) -> None:
    if problems:
        raise InputError(f"{len(problems)} problems in {place}; correct or remove these rows:{bulleted(problems)}")


def _parse(row: Any) -> Request:
    if not isinstance(row, Mapping):
        raise InputError(f"a {type(row).__name__}; a question is an object with id, prompt and, if any, image")
    own_id, key = _one_of(row, _IDS), _one_of(row, _PROMPTS)
    if not isinstance(row[own_id], int | str) or isinstance(row[own_id], bool):
        raise InputError(f"{own_id} is {row[own_id]!r}; give a number or a text")
    images = row.get("image")
    names = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"image is {images!r}; give a file name, a list of them, or leave it out")
    prompt = row[key]
    if key == "conversations":
        prompt = _conversation(prompt)
    elif not isinstance(prompt, str):
        raise InputError(f"{key} is a {type(prompt).__name__}; give a text")
    return Request(row[own_id], tuple(names), prompt)


def _one_of(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    present = [key for key in keys if key in row]
    if len(present) != 1:
        raise InputError(f"has {' and '.join(present) or 'none'} of {', '.join(keys)}; give one of them")
    return present[0]


def _conversation(turns: Any) -> list[dict[str, str]]:
    well_formed = isinstance(turns, list) and all(
        isinstance(turn, Mapping) and turn.get("from") in ("human", "gpt") and isinstance(turn.get("value"), str)
        for turn in turns
    )
    if not well_formed:
        raise InputError("conversations is no list of {'from': 'human' | 'gpt', 'value': text}")
    asked = [dict(turn) for turn in turns]
    if asked and asked[-1]["from"] == "gpt":
        asked.pop()
    if not asked:
        raise InputError("conversations has no question; it needs at least one turn of the human")
    return asked
