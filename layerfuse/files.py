"""Files and folders that appear whole or not at all, and room that is looked for before something is written."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from layerfuse.errors import FileAccessError

__all__ = ["atomic_file", "atomic_folder", "check_disk_space", "interrupted_save", "process_is_alive", "write_text"]

_SAVING, _REPLACED = ".saving-", ".replaced-"
# Without these, a folder is no model and no adapter.
_CONFIGS = ("config.json", "adapter_config.json")
# As transformers and safetensors name weights, whole, in shards, and the shards' index.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


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
            file.flush()
            os.fsync(file.fileno())
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

    A model's files cannot all change at one moment. So a config that is to be replaced is put aside before the first
    file moves, and the new one comes last: whenever this process is killed, the folder holds the old model, the new
    one, or no config, without which nothing loads; what was put aside then lies in ``.replaced-*``. With a new
    ``config.json``, weights of other names go too (shards of the old model beside one file of the new). All other files
    stay. An error puts everything back.

    Args:
        folder: made if need be.

    Yields:
        The scratch folder, on the same file system.

    Raises:
        OSError: if the folder cannot be written to; it is as it was before.
    """
    folder = Path(folder)
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = _own_folder(folder, _SAVING)
    try:
        yield scratch
        for path in scratch.rglob("*"):
            _open_as_new(path)
            _flush(path)
        _swap(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not existed:
            _remove_if_empty(folder)
    _remove_leftovers(folder)


def interrupted_save(folder: str | Path) -> Path | None:
    """Find what a save that was killed had put aside.

    Args:
        folder: of a model.

    Returns:
        The folder with the earlier model's files, or None.
    """
    return next(iter(sorted(Path(folder).glob(f"{_REPLACED}*"))), None)


def _swap(scratch: Path, folder: Path) -> None:
    """Move the files of `scratch` into `folder`, a config last, and out of it what they replace, a config first."""
    new = sorted(scratch.iterdir(), key=_rank)
    names = {path.name for path in new}
    weights = folder.iterdir() if _CONFIGS[0] in names else ()
    stale = [path for path in weights if path.name not in names and _WEIGHTS.fullmatch(path.name)]
    old = [folder / path.name for path in reversed(new) if os.path.lexists(folder / path.name)] + stale
    if len(new) == 1 and not stale and new[0].is_file():
        os.replace(new[0], folder / new[0].name)
        _flush(folder)
        return
    aside = _own_folder(folder, _REPLACED)
    with ExitStack() as undo:
        undo.callback(_remove_if_empty, aside)
        for source, target in [*((path, aside / path.name) for path in old), *((p, folder / p.name) for p in new)]:
            os.replace(source, target)
            undo.callback(os.replace, target, source)
            if _rank(source):
                _flush(folder)
        undo.pop_all()
    shutil.rmtree(aside, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _rank(path: Path) -> int:
    """Order in which files appear: what a loader asks for first comes last."""
    return 2 if path.name in _CONFIGS else int(path.name.endswith("config.json"))


def _own_folder(folder: Path, prefix: str) -> Path:
    """Make a folder whose name says which process works in it."""
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{socket.gethostname()}-{os.getpid()}-", dir=folder))


def _remove_leftovers(folder: Path) -> None:
    """Remove scratch folders of processes of this machine that are gone; called when a whole model is in place."""
    for prefix in (_SAVING, _REPLACED):
        for path in folder.glob(f"{prefix}{glob.escape(socket.gethostname())}-*-*"):
            process = path.name.rsplit("-", 2)[1]
            if process.isdigit() and not process_is_alive(int(process)):
                shutil.rmtree(path, ignore_errors=True)


def process_is_alive(process: int) -> bool:
    """Tell whether a process of this machine is there; where that cannot be asked without harm (Windows), yes.

    Args:
        process: its number.
    """
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk; a name that appears before its content could outlive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems without it
            raise
    finally:
        os.close(descriptor)


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
        raise FileAccessError(
            errno.ENOSPC,
            f"{what} needs {needed / 2**30:.2f} GiB, but the disk of {folder} has {free / 2**30:.2f} GiB left. Nothing "
            "was removed; make room, then start the same command again",
        )
