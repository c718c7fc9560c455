"""Files of questions to be answered: read, and checked before a model is loaded.

A row is `{"id": …, "image": "name.jpg" | ["a.jpg", …] (optional), "prompt": text}`, one a line (jsonl) or in one JSON
list. `question_id` and `text`, as LLaVA's question files have them, mean the same as `id` and `prompt`. Instead of a
prompt a row may have `conversations` in LLaVA's format: earlier turns are read, the human's last one is answered, and
an answer behind it, as training data have, is not shown to the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from integrations.llava._files import is_writable_text
from integrations.llava._text import bulleted, printable
from integrations.llava.data import SampleFile, is_outside, linked_media, unread_media
from integrations.llava.data.doctor import find_broken_images
from integrations.llava.image_layout import ImageSize
from layerfuse.errors import InputError, UserError

from .prompt_builder import Preparer, Prompt, as_turns

__all__ = ["Request", "prompt_lengths", "question_fingerprints", "read_requests", "refuse_broken_images"]

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
    """Read a file of questions, jsonl or json, see above.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, a row is no question, or an id occurs twice; the rows at fault are listed.
    """
    rows = SampleFile(path)
    requests: list[Request] = []
    problems: list[str] = []
    # By their spelling: 1 and "1" would be one question to whoever reads the answers, and to the seed of sampling.
    places: dict[str, str] = {}
    for index in range(len(rows)):
        try:
            request = _parse(rows.row(index))
        except UserError as error:
            problems.append(f"{rows.place(index)}: {error}")
            continue
        key = str(request.id)
        if key in places:
            problems.append(f"{rows.place(index)}: id {request.id!r} was used in {places[key]}")
        places.setdefault(key, rows.place(index))
        requests.append(request)
    _refuse(problems, str(path))
    return requests


def prompt_lengths(
    requests: Sequence[Request], preparer: Preparer, *, image_folder: str | Path, max_new_tokens: int = 1
) -> list[int]:
    """Count the positions that each prompt takes up, images included.

    A file that is no picture counts as one of the model's own size; `refuse_broken_images` tells of it.

    Raises:
        ValueError: listing the questions that the model cannot be asked.
    """
    lengths: list[int] = []
    problems: list[str] = []

    @cache  # many questions are about one image
    def size_of(name: str) -> ImageSize | None:
        return preparer.sizes([Path(image_folder) / name])[0] if preparer.layout.depends_on_size else None

    for request in requests:
        try:
            sizes = [size_of(name) for name in request.images]
            lengths.append(len(preparer.encode(request.prompt, sizes, max_new_tokens=max_new_tokens)))
        except UserError as error:
            problems.append(f"id {request.id!r}: {error}")
    _refuse(problems, "the questions")
    return lengths


def refuse_broken_images(requests: Iterable[Request], image_folder: str | Path) -> None:
    """Raise a ValueError that lists the questions' images which are missing, broken or outside of the folder."""
    names = list(dict.fromkeys(name for own in requests for name in own.images))
    # As in training: a file of questions from elsewhere chooses among the images that it was given.
    links = [f"image {printable(name)}: {link}; give a file" for name in names if (link := linked_media(name))]
    outside = [
        f"image {name}: outside the image folder (for absolute names give / as the folder)"
        for name in names
        if is_outside(name, image_folder)
    ]
    _refuse(links or outside or find_broken_images(image_folder, names), str(image_folder))


def question_fingerprints(requests: Sequence[Request], image_folder: str | Path) -> dict[int | str, str]:
    """Map ids to 12 hexadecimal digits of a hash over the question's prompt, names of images and sizes in bytes."""
    sizes: dict[str, int | None] = {}
    for name in dict.fromkeys(name for own in requests for name in own.images):
        try:
            sizes[name] = (Path(image_folder) / name).stat().st_size
        except (OSError, ValueError):  # told by `refuse_broken_images`, unless the question was answered already
            sizes[name] = None
    asked = {own.id: [own.prompt, [[name, sizes[name]] for name in own.images]] for own in requests}
    return {own_id: hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12] for own_id, what in asked.items()}


def _refuse(problems: Sequence[str], place: str) -> None:
    if problems:
        raise InputError(f"{len(problems)} problems in {place}; correct or remove these rows:{bulleted(problems)}")


def _parse(row: Any) -> Request:
    if not isinstance(row, Mapping):
        raise InputError(f"a {type(row).__name__}; a question is an object with id, prompt and, if any, image")
    own_id, key = _one_of(row, _IDS), _one_of(row, _PROMPTS)
    if not is_writable_text(row):
        raise InputError("holds half of a character (an escape such as \\ud83d alone); write it whole")
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
    for key, advice in unread_media({**row, "conversations": as_turns(prompt)}):
        raise InputError(f"has {key!r}, which is not read; {advice}")
    return Request(row[own_id], tuple(names), prompt)


def _one_of(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    present = [key for key in keys if key in row]
    if len(present) != 1:
        raise InputError(f"has {' and '.join(present) or 'none'} of {', '.join(keys)}; give one of them")
    return present[0]


def _conversation(turns: Any) -> list[Any]:
    if not isinstance(turns, list):
        raise InputError(f"conversations is a {type(turns).__name__}; give a list of turns")
    asked = as_turns(turns)
    if asked and asked[-1]["from"] == "gpt":
        asked.pop()
    if not asked:
        raise InputError("conversations has no question; it needs at least one turn of the human")
    return asked
