"""Files that benchmarks are published as, read with one error each: LLaVA's question files, JSON, parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from integrations.llava._files import json_lines
from integrations.llava._text import listed
from layerfuse.errors import InputError, MissingFileError, MissingPackageError

from .task import Question, Task

__all__ = ["existing_file", "parquet_rows", "read_llava_questions", "read_published_json", "refuse_unknown_ids"]

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet")


def read_llava_questions(task: Task, kind: str, folder: str | Path, name: str, images: str) -> list[Question]:
    """Read a question file of LLaVA's ``eval.zip``: JSON lines of ``question_id``, ``image``, ``text``, others.

    Args:
        task: for messages about a missing file.
        kind: of the questions.
        folder: of all data.
        name: of the question file in it.
        images: folder, in `folder`, that names of images are relative to.

    Returns:
        The questions, without answers, in the order of the file; ids are as they stand there, doubled ones, too.

    Raises:
        FileNotFoundError: if there is no such file; it says where to get it.
        ValueError: naming the line, if one is no question.
    """
    path = existing_file(task, folder, name)
    questions = []
    for number, row in json_lines(path):
        own_id, image, text = (row.get(key) for key in ("question_id", "image", "text"))
        if isinstance(own_id, bool) or not isinstance(own_id, int | str) or not isinstance(text, str):
            raise InputError(f"{path}, line {number} is no question; it needs question_id (number or text) and text.")
        if image is not None and not isinstance(image, str):
            raise InputError(f"{path}, line {number}: image is {json.dumps(image):.80}; give a name, or leave it out.")
        fields = {key: value for key, value in row.items() if key not in ("question_id", "image", "text")}
        shown: str | tuple[str, ...] = () if image is None else f"{images}/{image}"
        questions.append(Question(own_id, shown, text, kind, fields=fields))
    if not questions:
        raise InputError(f"{path} holds no question; give the whole file.")
    return questions


def existing_file(task: Task, folder: str | Path, name: str) -> Path:
    """Return the path of a file of a task.

    Raises:
        FileNotFoundError: if it is not there, with what the task says about where to get it.
    """
    path = Path(folder) / name
    if not path.is_file():
        told = next((f" ({own.what}; {own.source})" for own in task.needs() if own.path == name), "")
        raise MissingFileError(f"{path} does not exist{told}; give the folder that holds {name} as the data folder.")
    return path


def read_published_json(task: Task, folder: str | Path, name: str) -> Any:
    """Read a JSON file of a task.

    Raises:
        FileNotFoundError: if there is no such file; it says where to get it.
        ValueError: if it is no JSON.
    """
    path = existing_file(task, folder, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}); get it anew.") from error


def refuse_unknown_ids(asked: Collection[int | str], known: Collection[int | str], path: Path) -> None:
    """Raise a ValueError that counts and lists the ids of questions that a file does not have."""
    there = set(known)
    missing = [str(own_id) for own_id in asked if own_id not in there]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(asked)} questions are not in {path}; ids {listed(missing, most=10)}. "
            "Give files of one version."
        )


def parquet_rows(
    task: Task, folder: str | Path, pattern: str, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the parquet files that fit a pattern, in the order of their names; pictures are bytes.

    A column of pictures, as the Hugging Face hub has them, holds ``{"bytes": b"...", "path": ...}``.

    Raises:
        FileNotFoundError: if no file fits.
        ImportError: if pyarrow is not installed.
        ValueError: if a file cannot be read, or lacks a column, or of several parts one is missing or doubled.
    """
    paths = sorted(Path(folder).glob(pattern))
    if not paths:
        existing_file(task, folder, pattern)
    _refuse_odd_parts(paths)
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"reading {paths[0]} needs pyarrow, which is not installed; `pip install layerfuse[parquet]`."
        ) from error
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
            if missing:
                raise InputError(f"{path} lacks {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}.")
            for batch in file.iter_batches(batch_size=64, columns=None if columns is None else list(columns)):
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{path} cannot be read as parquet ({error}); get it anew.") from error


def _refuse_odd_parts(paths: Sequence[Path]) -> None:
    """Raise a ValueError where files named NAME-00000-of-00003… are not three, each once."""
    parts: dict[tuple[Path, str], list[tuple[int, int]]] = {}
    for path in paths:
        found = _PART.fullmatch(path.name)
        if found is not None:
            parts.setdefault((path.parent, found[1]), []).append((int(found[2]), int(found[3])))
    for (folder, name), own in parts.items():
        total = max(count for _, count in own)
        wrong = [str(index) for index in range(total) if own.count((index, total)) != 1]
        if wrong or len(own) != total:
            raise InputError(
                f"{folder}: {name} comes in {total} parts, of which {len(wrong)} are missing or doubled "
                f"({listed(wrong, most=10)}; {len(own)} files are there). Give each once, all of one version."
            )
