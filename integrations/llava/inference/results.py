"""Questions answered into a file, whatever interrupts it, by one process or several.

Every process appends to a part file of its own beside the output (`answers.jsonl.part-00001-of-00004-` and digits that
no other process has), so none can spoil another's, on any file system, without a lock. Whoever finds that all questions
are answered, the last process or a later run, merges the parts in the order of the questions; so the output itself is
there only when it is complete. An interrupted run goes on from the parts, with any number of processes; a line that was
half written when its process died is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from integrations.llava._files import json_lines
from integrations.llava.modeling import Quantization
from layerfuse.errors import FileAccessError, InputError
from layerfuse.files import atomic_file, file_digest

from .batching import Shard, answer_batches, form_batches
from .predictor import Predictor, default_dtype, load_predictor, usable_device
from .prompt_builder import PreparedPrompts, Preparer, load_preparer
from .requests import Request, prompt_lengths, question_fingerprints, refuse_broken_images
from .sampling import SamplingParams

__all__ = ["AnswerFile", "ReadModel", "answer_requests", "answer_settings", "weights_fingerprint"]


class AnswerFile:
    """The answers to a file of questions, also while they are being written.

    Every row of the output, jsonl, holds `model_id`, `metadata` (all that answers depend on) and the fingerprint of its
    question. With `overwrite`, earlier answers are left out of account, and removed once there is a new one.

    Raises:
        ValueError: if there are answers to other questions, or made under other settings, or if several processes are
            to overwrite.
        OSError: if the output cannot be written there; this is tried.
    """

    def __init__(
        self,
        path: str | Path,
        requests: Sequence[Request],
        *,
        fingerprints: Mapping[int | str, str],
        model_id: str,
        metadata: Mapping[str, Any],
        shard: Shard,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.requests = requests
        self._row = {"model_id": model_id, "metadata": dict(metadata)}
        self._fingerprints = fingerprints
        self._questions = {request.id: request.question for request in requests}
        own = f"{self.path.name}.part-{shard.index:05d}-of-{shard.count:05d}-{uuid.uuid4().hex[:8]}"
        self._part = self.path.with_name(own)
        self._try_place()
        self._stale: list[Path] = []
        if overwrite:
            if shard.count > 1:
                raise InputError(
                    f"several processes cannot overwrite {path}: one might remove what another has just written. "
                    f"Remove it and its parts ({self.path.name}.part-*) first."
                )
            self._stale = [old for old in [self.path, *self._parts()] if old.exists()]
            for old in self._stale:
                _refuse_foreign(old)
        self._rows = self._read()

    def __contains__(self, own_id: object) -> bool:
        """Whether the question of this id was answered when the file was opened, or since by this process."""
        return own_id in self._rows

    @property
    def answers(self) -> dict[int | str, str]:
        """Id -> answer of all questions that are known to be answered."""
        return {own_id: row["answer"] for own_id, row in self._rows.items()}

    def write(self, answers: Mapping[int | str, str]) -> None:
        """Append answers, id -> text, at once; they are on the disk when this returns.

        Raises:
            OSError: if they cannot be written; what was written before stays, and these are kept in the folder for
                temporary files, if there is room.
        """
        rows = {}
        for own_id, answer in answers.items():
            asked = {"id": own_id, "prompt": self._questions[own_id], "question": self._fingerprints[own_id]}
            rows[own_id] = {**asked, "answer": answer, **self._row}
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()).encode()
        try:
            _append(self._part, text)
        except OSError as error:
            raise FileAccessError(
                f"answers cannot be written to {self.path.parent} ({error.strerror or error}). {self._keep(text)}"
            ) from error
        self._rows.update(rows)
        # Not before there is something in their place.
        while self._stale:
            self._stale.pop().unlink(missing_ok=True)

    def merge(self) -> int:
        """Write the output and remove the parts, if every question is answered by now; return how many are not.

        Raises:
            OSError: if the output cannot be written; the parts stay.
        """
        parts = self._parts()
        self._rows = self._read()
        missing = len(self._questions.keys() - self._rows.keys())
        if not missing:
            advice = "Every answer is in the parts beside it; make room, then start the same command again."
            with _told(self.path, advice), atomic_file(self.path, tidy=True) as file:
                for request in self.requests:
                    file.write((json.dumps(self._rows[request.id], ensure_ascii=False) + "\n").encode())
            for part in parts:
                # On Windows, another process may be reading it just now.
                with suppress(PermissionError):
                    part.unlink(missing_ok=True)
        return missing

    def _try_place(self) -> None:
        """Write where answers are to stand: before a model is loaded, and hours are spent."""
        if self.path.is_dir():
            raise FileAccessError(f"{self.path} is a folder; give the name of a file of answers.")
        with _told(self.path, "Nothing was asked yet; give an output that can be written."):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _append(self._part, b"\n" * 4096)
            finally:
                self._part.unlink(missing_ok=True)

    def _keep(self, text: bytes) -> str:
        """Put rows that found no room where temporary files are; say where they and the earlier ones stand."""
        part = Path(tempfile.gettempdir()) / self._part.name
        there = f"Earlier answers are in {self._part}. " if self._part.exists() else ""
        try:
            _append(part, text)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            return f"{there}Those of this batch are lost; make room, then start the same command again."
        return (
            f"{there}Those of this batch are in {part}: make room, move it to {self.path.parent}, then start the same "
            "command again."
        )

    def _parts(self) -> list[Path]:
        prefix = f"{self.path.name}.part-"
        return sorted(path for path in self.path.parent.iterdir() if path.name.startswith(prefix))

    def _read(self) -> dict[int | str, dict[str, Any]]:
        # The output last: a process that merges puts it there before it removes the parts.
        rows: dict[int | str, dict[str, Any]] = {}
        for path in [*self._parts(), self.path]:
            if path in self._stale:
                continue
            # Gone if another process has merged it since: then the output has its rows.
            with suppress(FileNotFoundError):
                for number, row in json_lines(path, growing=True):
                    self._check(row, f"{path}, line {number}")
                    rows[row["id"]] = row
        return rows

    def _check(self, row: Mapping[str, Any], place: str) -> None:
        way_out = "Give another output, or overwrite it (--overwrite)."
        if not {"id", "prompt", "answer", "metadata"} <= row.keys() or not isinstance(row["id"], int | str):
            raise InputError(f"{place} is no answer (id, prompt, answer, model_id, metadata). {way_out}")
        if self._questions.get(row["id"]) != row["prompt"]:
            raise InputError(f"{place} answers another question with id {row['id']!r}: {row['prompt']!r}. {way_out}")
        if row["metadata"] != self._row["metadata"]:
            raise InputError(
                f"{place} was answered by another model or under other settings: {row['metadata']}; now they are "
                f"{self._row['metadata']}. {way_out}"
            )
        if row.get("question") != self._fingerprints[row["id"]]:
            raise InputError(
                f"{place} answers the same words with id {row['id']!r} about other images, or behind other turns "
                f"(compared are turns, names of images and their sizes in bytes). {way_out}"
            )


def _refuse_foreign(path: Path) -> None:
    """Refuse to remove what is no file of answers, such as the file of questions."""
    try:
        row = next(json_lines(path, growing=True), (0, None))[1]
    except InputError as error:
        raise InputError(f"{path} holds no answers ({error}); give another output, or remove it yourself.") from error
    if row is not None and not row.keys() >= {"id", "prompt", "answer"}:
        raise InputError(f"{path} holds something else than answers; give another output, or remove it yourself.")


def _append(path: Path, text: bytes) -> None:
    """Append lines so that all of them are on the disk, or none."""
    # Unbuffered: a buffer that could not be emptied would be written once more when the file is closed.
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except (OSError, KeyboardInterrupt):
            with suppress(OSError):
                file.truncate(end)
            raise


@contextmanager
def _told(path: Path, advice: str) -> Iterator[None]:
    """Turn the system's error about a file into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise FileAccessError(f"{path} cannot be written ({error.strerror or error}). {advice}") from error


@dataclass
class ReadModel:
    """What `answer_requests` has read of a model, for the next file of questions to the same one, options included."""

    preparer: Preparer | None = None
    weights: str | None = None
    predictor: Predictor | None = None


def answer_requests(
    requests: Sequence[Request],
    model_folder: str | Path,
    path: str | Path,
    *,
    image_folder: str | Path,
    sampling: SamplingParams,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantization = "none",
    compile: bool = False,
    shard: Shard | None = None,
    overwrite: bool = False,
    num_workers: int | None = None,
    show_bar: bool | None = None,
    check: Callable[[Mapping[int | str, str]], None] | None = None,
    read: ReadModel | None = None,
) -> tuple[AnswerFile, int]:
    """Answer the questions that have no answer in a file yet, and write each batch as it comes.

    Whatever can be known before the model is loaded is checked before; it is not loaded if nothing waits. Options are
    as for `AnswerFile`, `load_predictor` and `Predictor.asker`; `show_bar`, if None, shows progress on a terminal;
    `check` is told the earlier answers, id -> text, and may refuse to go on; what is read of the model is taken from
    `read`, and left there.

    Returns:
        The file, to be merged, and the number of questions that were answered now.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if a prompt does not fit, an image cannot be read (all are listed), a number is too small, or as
            `AnswerFile` does.
        OSError: if answers cannot be written there.
    """
    device, shard = usable_device(device), shard or Shard()
    dtype = dtype or default_dtype(model_folder, device, quantize)
    read = read or ReadModel()
    preparer = read.preparer = read.preparer or load_preparer(model_folder)
    longest = sampling.max_new_tokens
    lengths = prompt_lengths(requests, preparer, image_folder=image_folder, max_new_tokens=longest)
    batches = form_batches(lengths, batch_size, shard, groups=[own.images for own in requests])
    read.weights = read.weights or weights_fingerprint(model_folder)
    settings = answer_settings(
        model_folder, preparer, dtype=dtype, quantize=quantize, sampling=sampling, weights=read.weights
    )
    output = AnswerFile(
        path,
        requests,
        fingerprints=question_fingerprints(requests, image_folder),
        model_id=Path(model_folder).resolve().name,
        metadata=settings,
        shard=shard,
        overwrite=overwrite,
    )
    if check is not None:
        check(output.answers)
    if num_workers is not None and num_workers < 0:
        raise InputError(f"num_workers={num_workers} is negative; give 0 or more processes.")

    def ask(waiting: Sequence[Sequence[int]]) -> Iterator[Sequence[str]]:
        refuse_broken_images((requests[index] for batch in waiting for index in batch), image_folder)
        predictor = read.predictor = read.predictor or load_predictor(
            model_folder, device=device, dtype=dtype, quantize=quantize, compile=compile
        )
        images = [[Path(image_folder) / name for name in own.images] for own in requests]
        prompts = PreparedPrompts(predictor.prepare, [own.prompt for own in requests], images, max_new_tokens=longest)
        asker = predictor.asker(prompts, [str(own.id) for own in requests], sampling, num_workers=num_workers)
        yield from asker(waiting)

    answered = answer_batches(
        ask,
        batches,
        lambda answers: output.write({requests[index].id: text for index, text in answers.items()}),
        answered={index for index, own in enumerate(requests) if own.id in output},
        show_bar=show_bar,
    )
    return output, answered


def answer_settings(
    folder: str | Path,
    preparer: Preparer,
    *,
    dtype: torch.dtype,
    quantize: str,
    sampling: SamplingParams,
    weights: str | None = None,
) -> dict[str, Any]:
    """JSON-able values of all that the answers of the model in a folder depend on beside their questions."""
    return {
        "weights": weights or weights_fingerprint(folder),
        "processor": preparer.fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        "quantize": quantize,
        **sampling.to_dict(),
    }


def weights_fingerprint(folder: str | Path) -> str:
    """12 hexadecimal digits of a hash over a model's config and all of its weights, wherever its folder lies.

    All are read, as they are again when the model is loaded: two checkpoints may differ in few rows of an embedding.
    """
    names = ("config.json", "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "non_lora_trainables.bin")
    files = [path for name in names for path in sorted(Path(folder).glob(name))]
    # Threads: hashing and reading run outside of Python's lock.
    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256(b"".join(pool.map(file_digest, files))).hexdigest()[:12]
