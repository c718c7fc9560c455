"""C source that the user's own compiler turns into a library, once for each processor, and Python calls with ctypes.

Nothing here is needed: where there is no compiler, or it fails, there is no library, which is logged once. Libraries
lie in a folder of the user's own; their names hold a digest of all that they were made of and one of their content, so
that a damaged or outdated one is made anew and processes may build at the same time.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["SWITCH", "compiled_library"]

_log = logging.getLogger(__name__)

SWITCH = "LAYERFUSE_NATIVE"
"""Environment variable that, set to 0, keeps anything from being compiled."""

# Floating point exceptions are not looked at, so that rounding and choices may be done in vectors.
_FLAGS = ("-O3", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
# What the compiler knows of this processor; the last is for those that know nothing of it.
_PROCESSOR = (("-march=native",), ("-mcpu=native",), ())
_MOST_SECONDS = 300


class _NoLibraryError(RuntimeError):
    """Why there is no library."""


def compiled_library(source: Path, defines: Sequence[str] = ()) -> ctypes.CDLL | None:
    """Return the library that a C file makes with ``-D`` of each of ``defines``; None, and a line in the log, if none.

    It takes a second or two once, and milliseconds when the library is in the user's folder.
    """
    try:
        return _library(source, [f"-D{define}" for define in defines])
    except (_NoLibraryError, OSError, subprocess.SubprocessError) as error:
        _log.info("%s is not compiled, a slower way is taken: %s", source.name, error)
        return None


def _library(source: Path, defines: list[str]) -> ctypes.CDLL:
    if os.environ.get(SWITCH) == "0":
        raise _NoLibraryError(f"{SWITCH} is 0")
    compiler = _compiler()
    flags, facts = _processor(compiler)
    command = [*compiler, *_FLAGS, *flags, *defines, str(source)]
    made_of = hashlib.sha256(b"\0".join((source.read_bytes(), facts, repr(command[:-1]).encode()))).hexdigest()[:32]
    folder = _own_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="layerfuse-") as temporary:
            return ctypes.CDLL(str(_build(command, Path(temporary), made_of)))
    for path in sorted(folder.glob(f"{made_of}-*.so")):
        # Read before it is loaded: a library that is cut short ends the process.
        if path.stem == f"{made_of}-{_digest(path)}":
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    return ctypes.CDLL(str(_build(command, folder, made_of)))


def _compiler() -> list[str]:
    """Return the command of the C compiler: that of the variable CC, or the system's."""
    for command in (os.environ.get("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    raise _NoLibraryError("there is no C compiler")


def _processor(compiler: list[str]) -> tuple[tuple[str, ...], bytes]:
    """Return the flags by which the compiler takes this processor, and all that it knows of itself and of it."""
    for flags in _PROCESSOR:
        asked = subprocess.run(
            [*compiler, *flags, "-E", "-dM", "-x", "c", os.devnull], capture_output=True, timeout=_MOST_SECONDS
        )
        if asked.returncode == 0:
            return flags, asked.stdout
    raise _NoLibraryError(f"{shlex.join(compiler)} fails: {asked.stderr.decode(errors='replace').strip()}")


def _build(command: list[str], folder: Path, made_of: str) -> Path:
    """Compile into a folder, under a name that only a whole library gets."""
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    draft = Path(name)
    try:
        done = subprocess.run([*command, "-o", name, "-lm"], capture_output=True, timeout=_MOST_SECONDS)
        if done.returncode:
            raise _NoLibraryError(f"the compiler fails: {done.stderr.decode(errors='replace').strip()}")
        path = folder / f"{made_of}-{_digest(draft)}.so"
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _own_folder() -> Path | None:
    """Return the folder for libraries, which nobody else may write to; None where there can be none."""
    with contextlib.suppress(OSError, RuntimeError):  # no home is a RuntimeError
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerfuse" / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if stat.S_ISDIR(found.st_mode) and private and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None
