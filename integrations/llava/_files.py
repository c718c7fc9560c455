r"""The one reader of small JSON-lines files: split at ``\n`` only, each fault with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerfuse.errors import FileAccessError, InputError

__all__ = ["is_writable_text", "json_lines"]

_BOM = b"\xef\xbb\xbf"


def json_lines(path: str | Path, *, growing: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    r"""Yield the number, from 1, and the object of each line of a JSON-lines file in UTF-8.

    A line ends at ``\n`` and nowhere else: U+2028 and U+0085, at which `str.splitlines` also splits, stand unescaped
    inside texts. A byte-order mark and blank lines are passed over; of a `growing` file, whose last line a process may
    be writing or have died over, also a last line that is no JSON.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line is no JSON object; file and line are named.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(_BOM).split(b"\n")
    except (IsADirectoryError, PermissionError) as error:
        raise FileAccessError(f"{path} cannot be read ({error.strerror}); give a file that can be.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, _parse(line, f"{path}, line {number}")
        except InputError:
            if not growing or number < len(lines):
                raise


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}); expected one JSON object a line, in UTF-8.") from error
    if not isinstance(row, dict):
        raise InputError(f"{place} is a {type(row).__name__}; expected one JSON object a line.")
    if not is_writable_text(row):
        raise InputError(f"{place} holds half of a character (an escape such as \\ud83d alone); write it whole.")
    return row


def is_writable_text(value: Any) -> bool:
    """Whether all texts in a JSON value can be written as UTF-8; the halves of a surrogate pair alone cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
