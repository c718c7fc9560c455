"""Files and folders that appear whole or not at all, and room that is looked for before something is written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file", "atomic_folder", "check_disk_space", "write_text"]


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing under a scratch name that no other process uses; rename it at the end.

    Args:
        path: what the file is called once it is whole; one of that name is replaced.

    Yields:
        The open file.

    Raises:
        OSError: if the folder cannot be written to or the disk is full; nothing is left behind then.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with scratch.open("xb") as file:
            yield file
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; one of that name is replaced.

    Args:
        path: of the file.
        text: its content, written in UTF-8.

    Raises:
        OSError: as `atomic_file`.
    """
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Give a scratch folder whose files move into `folder` when the block ends without error.

    The config moves last: a folder with a config has its weights. Files of other names stay where they are.

    Args:
        folder: made if need be.

    Yields:
        The scratch folder, on the same file system.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield scratch
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
            _open_as_new(path)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _open_as_new(path: Path) -> None:
    """Give a file the rights of one that was opened in the usual way; safetensors lets nobody else read its files."""
    if path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            probe = Path(folder) / "probe"
            probe.touch()
            path.chmod(probe.stat().st_mode)


def check_disk_space(folder: str | Path, needed: int, what: str) -> None:
    """Make sure that something fits before it is written.

    Args:
        folder: where it will be written; its nearest existing parent is asked.
        needed: bytes.
        what: for the message, such as "a checkpoint".

    Raises:
        OSError: if the disk has less room; nothing was written or removed.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {needed / 2**30:.2f} GiB, but the disk of {folder} has {free / 2**30:.2f} GiB left. Nothing "
            "was removed; make room, then start the same command again",
        )
