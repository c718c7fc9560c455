"""Tables as text for a terminal, as Markdown, and as comma-separated values."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence

from integrations.llava._text import aligned, column_widths

from .content import Cell, ComparisonTable, TableColumn, TableRow
from .stored import TablePlan

__all__ = ["EXPLANATION", "TEXT_WIDTH", "NoteList", "as_csv", "as_markdown", "as_text", "sources_of"]

TEXT_WIDTH = 100
"""Characters in a line of a text that is not shown on a terminal."""
_MINUS = " − "

EXPLANATION = (
    "Numbers in brackets are 95 % intervals: questions drawn anew 1000 times, the number worked out in each draw; "
    "those of a difference between two checkpoints are paired. Published numbers, and those of servers, have none. "
    "They are compared with numbers of the same protocol only. 'Not seen' is a number that the source does not give."
)


class NoteList:
    """Notes of cells, each with its number, in the order in which they are first met."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def marks(self, cell: Cell) -> str:
        """The numbers of a cell's notes, ``1`` or ``1, 2``."""
        for note in cell.notes:
            if note not in self.texts:
                self.texts.append(note)
        return ", ".join(str(self.texts.index(note) + 1) for note in cell.notes)


def as_text(tables: Sequence[ComparisonTable], plan: TablePlan, *, width: int = TEXT_WIDTH) -> str:
    """All tables in columns, for a terminal of so many characters; columns that find no room stand below the others."""
    notes = NoteList()
    lines: list[str] = []
    for table in tables:
        lines += [table.title, "=" * len(table.title), ""]
        lines += _in_columns(_grid(table.columns, table.rows, notes), width)
        if table.differences:
            first, *rest = _grid(table.difference_columns, table.differences, notes)
            # A difference's name would be the widest of its column: it takes two lines.
            names = [name.rpartition(_MINUS) for name in first]
            heads = [[one for one, _, _ in names], [(sign + other).strip() for _, sign, other in names]]
            lines += ["", "differences", "-" * len("differences"), ""]
            lines += _in_columns([*heads, *rest], width, heads=3)
        lines += [""]
    for number, note in enumerate(notes.texts, start=1):
        lines += _wrapped(f"({number}) {note}", width)
    lines += [*([""] if notes.texts else []), *textwrap.wrap(EXPLANATION, width)]
    for line in _missing(plan, "\nMissing data", "  "):
        lines += _wrapped(line, width)
    return "\n".join(lines) + "\n"


def _in_columns(grid: Sequence[Sequence[str]], width: int, *, heads: int = 2) -> list[str]:
    """The grid's columns side by side while there is room, then the next ones, each time behind the rows' titles."""
    title, *widths = column_widths(grid)
    blocks: list[list[int]] = []
    room = 0
    for column, own in enumerate(widths, start=1):
        if not blocks or room < own + 2:
            blocks.append([])
            room = width - title
        blocks[-1].append(column)
        room -= own + 2
    lines: list[str] = []
    for block in blocks:
        rows = [[row[0], *(row[column] for column in block)] for row in grid]
        lines += [""] if lines else []
        lines += aligned(rows[:heads] + [row for row in rows[heads:] if any(row[1:])])
    return lines


def _wrapped(line: str, width: int) -> list[str]:
    """A line in lines of so many characters, further ones indented more; longer words, such as paths, stay whole."""
    bare = line.lstrip(" ")
    indent = " " * (len(line) - len(bare))
    wrapper = textwrap.TextWrapper(
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [wrapped for part in bare.split("\n") for wrapped in wrapper.wrap(part) or [""]]


def as_markdown(tables: Sequence[ComparisonTable], plan: TablePlan) -> str:
    """All tables in Markdown, with the sources of published numbers."""
    notes = NoteList()
    lines = ["# Evaluation", ""]
    for table in tables:
        lines += [f"## {table.title}", "", *_markdown(_grid(table.columns, table.rows, notes)), ""]
        if table.differences:
            lines += ["### Differences", "", *_markdown(_grid(table.difference_columns, table.differences, notes)), ""]
    lines += [f"({number}) {_escaped(note)}  " for number, note in enumerate(notes.texts, start=1)]
    lines += [*([""] if notes.texts else []), EXPLANATION, "", "Sources of published numbers:", ""]
    lines += [f"- {source}" for source in sources_of(tables)]
    lines += _missing(plan, "\n## Missing data\n", "- ")
    return "\n".join(lines) + "\n"


def as_csv(tables: Sequence[ComparisonTable]) -> str:
    """A line per number: table, row, column, protocol, kind of number, value, interval, notes, source."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "key", "row", "column", "protocol", "state", "value", "low", "high", "notes", "source"])
    for table in tables:
        both = ((table.columns, table.rows), (table.difference_columns, table.differences))
        for columns, rows in both:
            for row in rows:
                for column, cell in zip(columns, row.cells, strict=True):
                    if cell.state == "none":
                        continue
                    low, high = cell.interval or (None, None)
                    numbers = ["" if one is None else f"{one:.6g}" for one in (cell.value, low, high)]
                    own = [table.group, row.key, row.title, column.name, column.protocol, cell.state]
                    writer.writerow([*own, *numbers, "; ".join(cell.notes), cell.source])
    return file.getvalue()


def sources_of(tables: Sequence[ComparisonTable]) -> list[str]:
    """Sources of the published numbers in the tables, each once."""
    cells = (cell for table in tables for row in table.rows for cell in row.cells)
    return list(dict.fromkeys(cell.source for cell in cells if cell.source))


def _grid(columns: Sequence[TableColumn], rows: Sequence[TableRow], notes: NoteList) -> list[list[str]]:
    head = ["", *(column.name for column in columns)]
    protocols = ["protocol", *(column.protocol for column in columns)]
    body = [[("  " if row.is_part else "") + row.title, *(_shown(cell, notes) for cell in row.cells)] for row in rows]
    return [head, protocols, *body]


def _shown(cell: Cell, notes: NoteList) -> str:
    marks = notes.marks(cell)
    return f"{cell.text} ({marks})" if marks else cell.text


def _markdown(grid: Sequence[Sequence[str]]) -> list[str]:
    rows = [[_escaped(cell) for cell in row] for row in grid]
    rows = [[("&nbsp;&nbsp;" + row[0].strip() if row[0].startswith("  ") else row[0]), *row[1:]] for row in rows]
    rule = ["---", *["---:" for _ in rows[0][1:]]]
    return [f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]]]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")


def _missing(plan: TablePlan, title: str, bullet: str) -> list[str]:
    if not plan.missing:
        return []
    lines = [title]
    for name, own in plan.missing.items():
        lines.append(f"{bullet}{name} ({own.state}): {own.reason}")
        lines += [f"    {bullet}{path}: {what}; {source}" for path, what, source in own.needs]
    return lines
