"""Arrays about a data file, kept beside it, so that they are computed once and not by every process of every run.

An array is stored with the data file's size and time of change; one that belongs to another state of the file is
never used. Files are read as memory maps, so that all processes of a machine share their pages.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from layerfuse.files import atomic_file

__all__ = ["FileState", "cached_array", "file_state", "sidecar_paths"]

_log = logging.getLogger(__name__)

FileState = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""

# What belongs to a smaller file is computed anew in milliseconds and leaves nothing behind.
_MIN_BYTES = 8 * 2**20
# Seconds after which a process that holds the lock is taken for stuck.
_PATIENCE = 600


def file_state(path: Path) -> FileState:
    """Look up what tells two states of a file apart."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def sidecar_paths(path: Path, name: str) -> tuple[Path, Path]:
    """Places of an array about a data file, in order: beside it, and in the user's cache folder for read-only data."""
    resolved = path.resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerfuse"
    digest = hashlib.sha256(str(resolved).encode()).hexdigest()[:16]
    return resolved.with_name(f".{path.name}.{name}.npy"), cache / f"{path.name}.{digest}.{name}.npy"


def cached_array(path: Path, state: FileState, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Read an array about a data file, or compute and store it.

    Args:
        path: the data file.
        state: of the file that `compute` looks at.
        name: of the array; another name for another meaning or version.
        compute: gives the array, int64, any number of values.

    Returns:
        The values in one dimension; read-only.
    """
    places = sidecar_paths(path, name)
    stored = _load(places, state)
    if stored is not None:
        return stored
    with ExitStack() as held:
        if is_large := state[0] >= _MIN_BYTES:
            # One process of a machine does the work that the others wait for; where nothing can be locked, all do it.
            lock = FileLock(Path(tempfile.gettempdir()) / f"layerfuse-{places[1].name}.lock", timeout=_PATIENCE)
            with suppress(OSError, NotImplementedError):  # Timeout is an OSError
                held.enter_context(lock)
            if (stored := _load(places, state)) is not None:
                return stored
        values = np.ascontiguousarray(compute(), dtype=np.int64).reshape(-1)
        if is_large and file_state(path) == state:
            _store(places, np.concatenate([np.array(state, dtype=np.int64), values]))
    return values


def _load(places: Sequence[Path], state: FileState) -> np.ndarray | None:
    for place in places:
        with suppress(OSError, ValueError, EOFError):
            stored = np.asarray(np.load(place, mmap_mode="r", allow_pickle=False))
            if stored.dtype == np.int64 and stored.ndim == 1 and tuple(stored[:2].tolist()) == state:
                return stored[2:]
    return None


def _store(places: Sequence[Path], values: np.ndarray) -> None:
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as file:
                np.save(file, values)
            return
        except OSError as error:
            _log.debug("%s cannot be written: %s", place, error)
