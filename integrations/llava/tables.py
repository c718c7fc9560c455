"""Text laid out in columns."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "column_widths"]


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The longest cell of each column, in characters."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lay rows out in columns, two blanks between them.

    Args:
        rows: of equally many cells.
        left: columns that are flush left; the others are flush right.

    Returns:
        A line per row.
    """
    widths = column_widths(rows)
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
