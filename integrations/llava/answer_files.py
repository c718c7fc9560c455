"""Files of answers that survive interruptions and are written by several processes.

Every process appends to a part file of its own beside the output (`answers.jsonl.part-00001-of-00004`). Whoever finds
that all questions are answered, the last process or a later run, merges the parts in the order of the questions; so
the output itself is there only when it is complete. An interrupted run goes on from the parts, with any number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfuse.errors import InputError
from layerfuse.files import atomic_file

from .request_files import Request

__all__ = ["AnswerFile", "Shard", "find_shard", "weights_fingerprint"]


@dataclass(frozen=True)
class Shard:
    """Which process this is.

    Attributes:
        index: from 0.
        count: of processes.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a process that is none of them."""
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index}/{self.count} does not exist; the first of 4 is 0/4, the last 3/4.")


def find_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """Read which process this is.

    Args:
        text: "0/4" for the first of four; None asks the environment.
        environment: RANK and WORLD_SIZE, as torchrun sets them; one process if they are not set.

    Returns:
        The shard.

    Raises:
        ValueError: if the text is of another form, or there is no such process.
    """
    if text is None:
        return Shard(int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)))
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise InputError(f"shard {text!r} is not of the form INDEX/COUNT; the first of 4 is 0/4, the last 3/4.")
    return Shard(int(index), int(count))


class AnswerFile:
    """The answers to a file of questions, also while they are being written.

    Args:
        path: the output, jsonl.
        requests: the questions.
        model_id: written into every row.
        metadata: written into every row: all that the answers depend on.
        shard: which process this is.
        overwrite: remove earlier answers.

    Raises:
        ValueError: if there are answers to other questions, or made under other settings, or if several processes
            are to overwrite.
    """

    def __init__(
        self,
        path: str | Path,
        requests: Sequence[Request],
        *,
        model_id: str,
        metadata: Mapping[str, Any],
        shard: Shard,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.requests = requests
        self._row = {"model_id": model_id, "metadata": dict(metadata)}
        self._questions = {request.id: request.question for request in requests}
        self._part = self.path.with_name(f"{self.path.name}.part-{shard.index:05d}-of-{shard.count:05d}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            if shard.count > 1:
                raise InputError(
                    f"several processes cannot overwrite {path}: one might remove what another has just written. "
                    f"Remove it and its parts ({self.path.name}.part-*) first."
                )
            for old in [self.path, *self._parts()]:
                old.unlink(missing_ok=True)
        _repair(self._part)
        self._answers = self._read()

    def __contains__(self, own_id: object) -> bool:
        """Whether the question of this id was answered when the file was opened, or since by this process."""
        return own_id in self._answers

    def write(self, answers: Mapping[int | str, str]) -> None:
        """Append answers, id -> text, at once."""
        rows = {
            own_id: {"id": own_id, "prompt": self._questions[own_id], "answer": answer, **self._row}
            for own_id, answer in answers.items()
        }
        with self._part.open("ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()).encode())
        self._answers.update(rows)

    def merge(self) -> int:
        """Write the output, if every question is answered by now, and remove the parts.

        Returns:
            How many questions wait for their answer; with 0 the output is complete.
        """
        parts = self._parts()
        self._answers = self._read()
        missing = len(self._questions.keys() - self._answers.keys())
        if not missing:
            with atomic_file(self.path) as file:
                for request in self.requests:
                    file.write((json.dumps(self._answers[request.id], ensure_ascii=False) + "\n").encode())
            for part in parts:
                part.unlink(missing_ok=True)
        return missing

    def _parts(self) -> list[Path]:
        prefix = f"{self.path.name}.part-"
        return sorted(path for path in self.path.parent.iterdir() if path.name.startswith(prefix))

    def _read(self) -> dict[int | str, dict[str, Any]]:
        # The output last: a process that merges puts it there before it removes the parts.
        answers: dict[int | str, dict[str, Any]] = {}
        for path in [*self._parts(), self.path]:
            for number, row in _rows(path):
                self._check(row, f"{path}, line {number}")
                answers[row["id"]] = row
        return answers

    def _check(self, row: Any, place: str) -> None:
        way_out = "Give another output, or overwrite it (--overwrite)."
        if not isinstance(row, dict) or not {"id", "prompt", "answer", "metadata"} <= row.keys():
            raise InputError(f"{place} is no answer (id, prompt, answer, model_id, metadata). {way_out}")
        if self._questions.get(row["id"]) != row["prompt"]:
            raise InputError(f"{place} answers another question with id {row['id']!r}: {row['prompt']!r}. {way_out}")
        if row["metadata"] != self._row["metadata"]:
            raise InputError(
                f"{place} was answered by another model or under other settings: {row['metadata']}; now they are "
                f"{self._row['metadata']}. {way_out}"
            )


def _repair(path: Path) -> None:
    """Cut off a line that was half written when its process died."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            # Another process may be writing the last line just now.
            if number == len(lines):
                return
            raise InputError(f"{path}, line {number} is not JSON ({error}); remove the line, or the file.") from error
        if row is not None:
            yield number, row


def weights_fingerprint(folder: str | Path) -> str:
    """Tell models apart, wherever their folders lie, without reading all of their weights.

    Args:
        folder: of a model, in safetensors.

    Returns:
        12 hexadecimal digits of a hash over the config, names and shapes of all tensors, and the first bytes of each.
    """
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = file.read(size)
            digest.update(header)
            for name, tensor in json.loads(header).items():
                if name != "__metadata__":
                    start, end = tensor["data_offsets"]
                    file.seek(8 + size + start)
                    digest.update(file.read(min(64, end - start)))
    return digest.hexdigest()[:12]
