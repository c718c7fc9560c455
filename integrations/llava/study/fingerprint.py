"""Digests of the settings and code behind a finished part, which is used again only if they have not changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from layerfuse.errors import ExistingFileError
from layerfuse.files import file_digest as whole_digest
from layerfuse.files import write_text

__all__ = [
    "begin",
    "code_digest",
    "digest",
    "file_digest",
    "finished",
    "folder_digest",
    "mark_finished",
    "refuse_foreign",
]

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY = _PACKAGE.parents[1] / "layerfuse"
_MARK = "demo.json"


def digest(values: Mapping[str, Any]) -> str:
    """Digest of JSON-able settings; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """Digest of a file's bytes."""
    return whole_digest(path).hex()[:16]


def folder_digest(path: str | Path) -> str:
    """Digest of all files in a folder; of the name alone if there is no such folder, as for names on a hub."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    return digest({"name": str(path), **{str(file): file_digest(file) for file in files}})


@cache
def code_digest(part: str) -> str:
    """Digest of the code that a part's result depends on, and of the versions of torch and transformers.

    Args:
        part: ``"data"``, ``"evaluation"``, or ``"training"``: all code and weights but evaluation, analysis and study.
    """
    folders = {"data": _PACKAGE / "synthetic", "evaluation": _PACKAGE / "evaluation"}
    if part in folders:
        files = list(folders[part].rglob("*.py"))
    else:
        apart = {_PACKAGE / "evaluation", _PACKAGE / "study", _LIBRARY / "analysis"}
        entries = (path for path in (*_PACKAGE.rglob("*"), *_LIBRARY.rglob("*")) if apart.isdisjoint(path.parents))
        files = [path for path in entries if path.suffix in {".py", ".safetensors", ".json"}]
    state = {str(path): file_digest(path) for path in sorted(files) if path.is_file()}
    return digest({**state, **{name: metadata.version(name) for name in ("torch", "transformers")}})


def finished(folder: Path, part: str, fingerprint: str | None) -> dict[str, Any] | None:
    """Return the notes of a part of a run that finished; None if it did not, or had another fingerprint (None: any)."""
    entry = (_marks(folder) or {}).get(part)
    return entry["notes"] if entry is not None and fingerprint in (None, entry["fingerprint"]) else None


def mark_finished(folder: Path, part: str, fingerprint: str, notes: Mapping[str, Any]) -> None:
    """Write down in a run's folder that a part is finished, with a fingerprint of its inputs and JSON-able notes."""
    marks = {**(_marks(folder) or {}), part: {"fingerprint": fingerprint, "notes": dict(notes)}}
    write_text(folder / _MARK, json.dumps(marks, indent=1))


def begin(folder: Path) -> None:
    """Mark a folder as the demo's, with nothing finished in it, before parts are written anew; it is made if need be.

    Raises:
        FileExistsError: if it holds something that no demo wrote.
    """
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _MARK, "{}")


def refuse_foreign(folder: Path, names: Iterable[str] = ()) -> None:
    """Raise a FileExistsError for a folder without the demo's mark that holds anything, or one of `names` if any."""
    if _marks(folder) is not None or not folder.is_dir():
        return
    found = sorted(path.name for path in folder.iterdir() if path.name in names or not names)
    if found:
        raise ExistingFileError(
            f"{folder} holds {', '.join(found[:3])}, which the demo cannot be shown to have written, so it is "
            "left alone; give another folder (--output FOLDER), or move that away."
        )


def _marks(folder: Path) -> dict[str, Any] | None:
    """Read the notes in a folder; None where it is no folder of the demo's."""
    path = folder / _MARK
    try:
        marks = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        marks = None
    if not isinstance(marks, dict) or not all(
        isinstance(entry, dict) and "fingerprint" in entry for entry in marks.values()
    ):
        raise ExistingFileError(
            f"{path} was not written by the demo; give another folder (--output FOLDER), or move the file away."
        )
    return marks
