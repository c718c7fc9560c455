"""Text of messages: names and lists of which the first entries are shown, and tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "bulleted", "column_widths", "listed", "printable"]

_MOST = 20
_SHOWN = 400


def listed(names: Sequence[str], *, most: int | None = _MOST) -> str:
    """Names for a sentence, the first `most` of them (None: all); "none" if there are none."""
    return ", ".join(_first(names, most)) or "none"


def bulleted(entries: Sequence[object]) -> str:
    """Entries for below a sentence, each on its own line, the first 20 of them."""
    return "".join(f"\n  {entry}" for entry in _first(entries, _MOST))


def _first(entries: Sequence[object], most: int | None) -> list[str]:
    shown = [str(entry) for entry in entries[:most]]
    left = len(entries) - len(shown)
    return [*shown, f"… and {left} more"] if left else shown


def printable(text: str) -> str:
    """A name or text as it can be shown: halves of characters are escaped, a long one is shortened."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The longest cell of each column, in characters."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """A line per row, in columns with two blanks between them: the first `left` flush left, the others flush right."""
    widths = column_widths(rows)
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
