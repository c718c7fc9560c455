"""Files and folders that appear whole or not at all, and room that is looked for before something is written."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from layerfuse.errors import ExistingFileError, FileAccessError, InputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "atomic_file",
    "atomic_folder",
    "check_disk_space",
    "explain_missing_config",
    "file_digest",
    "holds_first_save_half_way",
    "interrupted_save",
    "process_is_alive",
    "read_safetensors",
    "read_safetensors_metadata",
    "remove_scratch_files",
    "write_text",
]

_SAVING, _REPLACED = ".saving-", ".replaced-"
# Without these, a folder is no model and no adapter.
_CONFIGS = ("config.json", "adapter_config.json")
# As transformers and safetensors name weights, whole, in shards, and the shards' index.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


@contextmanager
def atomic_file(path: Path, *, flush: bool = True, tidy: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing under a scratch name that no other process uses; rename it to ``path`` at the end.

    A file of that name is replaced. Without ``flush`` nothing waits for the disk: quicker by milliseconds, but a power
    cut can leave a file that holds less than was written. ``tidy`` removes what processes of this machine left of it
    that were killed while they wrote; the folder is listed for that, which takes its time where it holds thousands of
    files.

    Raises:
        OSError: if the folder cannot be written to or the disk is full; nothing is left behind then.
    """
    scratch = path.with_name(f".{path.name}.{_own_mark()}{uuid.uuid4().hex[:12]}.part")
    try:
        with scratch.open("xb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    if tidy:
        for left in _left_behind(path.parent, glob.escape(f".{path.name}.")):
            left.unlink(missing_ok=True)


def remove_scratch_files(folder: Path) -> None:
    """Remove what processes of this machine left of files in a folder that were killed while they wrote them."""
    for left in _left_behind(folder, ".*."):
        left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all and tidily, as `atomic_file` does."""
    with atomic_file(path, tidy=True) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Give a scratch folder whose files move into `folder` when the block ends without error.

    A model's files cannot all change at one moment. So a config that is to be replaced is put aside before the first
    file moves, and the new one comes last: whenever this process is killed, the folder holds the old model, the new
    one, or no config, without which nothing loads; what was put aside then lies in ``.replaced-*``. With a new
    ``config.json``, weights of other names go too (shards of the old model beside one file of the new). All other files
    stay. An error puts everything back. The folder is made if need be; a link to one is followed.

    Raises:
        FileAccessError: before the block runs, if the folder cannot be made or written to.
        OSError: if the disk is full; the folder is as it was before.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        scratch = _scratch_in(folder)
        try:
            mode = _mode_of_new_file(scratch)
            yield scratch
            for path in sorted(scratch.rglob("*")):
                if path.is_file():
                    path.chmod(mode)  # safetensors lets nobody else read its files
                _flush(path)
            moved = _swap(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        for place in made:
            _remove_if_empty(place)
    _remove_leftovers(folder, moved)


def interrupted_save(folder: str | Path) -> Path | None:
    """Return the folder with the files that a killed save had put aside, the newest of several, or None."""
    found = [path for path in Path(folder).glob(f"{_REPLACED}*") if any(path.iterdir())]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def holds_first_save_half_way(folder: str | Path) -> bool:
    """Tell whether a folder's files are those that a save moved there before it was killed, over no earlier model."""
    folder = Path(folder)
    begun = any(folder.glob(f"{_SAVING}*")) and not (folder / _CONFIGS[0]).exists()
    return begun and interrupted_save(folder) is None


def explain_missing_config(folder: str | Path) -> str:
    """Return a sentence on a killed save, with a space, to go behind "… holds no config.json"; else an empty text."""
    aside = interrupted_save(folder)
    if aside is None and not any(Path(folder).glob(f"{_SAVING}*")):
        return ""
    earlier = f", or move the earlier model's files back from {aside.name}" if aside else ""
    return f" A save into this folder was killed half-way: save again{earlier}."


def _scratch_in(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ExistingFileError(errno.EEXIST, f"{folder} is a file; give a folder, or a name that is not taken")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _own_folder(folder, _SAVING)
    except OSError as error:
        raise FileAccessError(
            error.errno, f"nothing can be written into {folder} ({error.strerror}); give another folder"
        ) from error


def _swap(scratch: Path, folder: Path) -> set[Path]:
    """Move the files of `scratch` into `folder`, a config last, and out of it what they replace, a config first.

    Returns:
        The names that were written or taken away, relative to the folder.
    """
    new = sorted((path.relative_to(scratch) for path in scratch.rglob("*") if not path.is_dir()), key=_rank)
    weights = folder.iterdir() if Path(_CONFIGS[0]) in new else ()
    stale = [Path(path.name) for path in weights if _WEIGHTS.fullmatch(path.name) and Path(path.name) not in new]
    old = [name for name in reversed(new) if os.path.lexists(folder / name) and not (folder / name).is_dir()] + stale
    if not new:
        return set()
    if len(new) == 1 and not stale:
        (folder / new[0]).parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / new[0], folder / new[0])
        _flush(folder)
        return set(new)
    aside = _own_folder(folder, _REPLACED)
    moves = [(folder / name, aside / name) for name in old] + [(scratch / name, folder / name) for name in new]
    with ExitStack() as undo:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            undo.callback(_remove_if_empty, target.parent)
            # A disk may write names in another order than they were given: an old config is gone before anything else
            # moves, and all else is there before a new one.
            if source.name in _CONFIGS:
                _flush(folder)
            os.replace(source, target)
            undo.callback(os.replace, target, source)
            if source.name in _CONFIGS:
                _flush(folder)
        _flush(folder)
        undo.pop_all()
    shutil.rmtree(aside, ignore_errors=True)
    return {*new, *stale}


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _rank(path: Path) -> int:
    """Order in which files appear: what a loader asks for first comes last."""
    return 2 if path.name in _CONFIGS else int(path.name.endswith("config.json"))


def _own_folder(folder: Path, prefix: str) -> Path:
    """Make a folder whose name says which process works in it."""
    return Path(tempfile.mkdtemp(prefix=prefix + _own_mark(), dir=folder))


def _own_mark() -> str:
    """What says in the name of a scratch file or folder which process works in it."""
    return f"{socket.gethostname()}-{os.getpid()}-"


def _left_behind(folder: Path, pattern: str) -> Iterator[Path]:
    """Scratch files or folders of processes of this machine that are gone; their names begin with a pattern."""
    for path in folder.glob(f"{pattern}{glob.escape(socket.gethostname())}-*-*"):
        process = path.name.rsplit("-", 2)[1]
        if process.isdigit() and not process_is_alive(int(process)):
            yield path


def _remove_leftovers(folder: Path, moved: set[Path]) -> None:
    """Remove what processes of this machine that are gone left behind, but nothing that was not written anew."""
    for prefix in (_SAVING, _REPLACED):
        for path in _left_behind(folder, glob.escape(prefix)):
            kept = {file.relative_to(path) for file in path.rglob("*") if not file.is_dir()}
            # Of an earlier model, this may be the only copy, as when a new save wrote no model.
            whole = Path(_CONFIGS[0]) in moved
            again = all(name in moved or (whole and _WEIGHTS.fullmatch(name.name)) for name in kept)
            if prefix == _SAVING or again:
                shutil.rmtree(path, ignore_errors=True)


def process_is_alive(process: int) -> bool:
    """Tell whether a process of this machine is there; where that cannot be asked without harm (Windows), yes."""
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


def _mode_of_new_file(folder: Path) -> int:
    """Ask the file system for the rights of a file that is opened in the usual way."""
    probe = folder / "probe"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def file_digest(path: str | Path) -> bytes:
    """SHA-256 of a file's content, 32 bytes; read piece by piece, so that weights of many GB need no memory.

    Raises:
        OSError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(2**22))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.digest()


def read_safetensors(path: str | Path, rows: slice | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, on the CPU, and its metadata; of ``rows``, each tensor's first dimension.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    with _open_safetensors(path) as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) if rows is None else file.get_slice(name)[rows] for name in names}
        return tensors, file.metadata() or {}


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a safetensors file and no tensor; errors are those of `read_safetensors`."""
    with _open_safetensors(path) as file:
        return file.metadata() or {}


@contextmanager
def _open_safetensors(path: str | Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open  # brings torch, which a folder of files does not need

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); write or download it anew.") from error


def check_disk_space(folder: str | Path, needed: int, what: str) -> None:
    """Raise an OSError if the disk of a folder, or of its nearest existing parent, has no room for the bytes needed.

    ``what`` is the thing to be written, for the message, such as "a checkpoint".
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
