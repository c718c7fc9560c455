"""Whether the page is still true: as far as can be told at once, and by trying some of its cells again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.model_table.cells import Outcome
from tools.model_table.data import DATA, TableData, TriedRow, read_data, versions_here
from tools.model_table.page import PAGE_FILE, model_page
from tools.model_table.tables import TABLES, all_keys, try_row

__all__ = ["COMMAND", "check_table", "find_differences", "stale_parts"]

COMMAND = "python -m tools.model_table"


def check_table(
    *, seconds: float, seed: int, data_file: Path = DATA, page: Path = PAGE_FILE, say: Callable[[str], None]
) -> list[str]:
    """Return a sentence for everything that is stale; empty if nothing was found.

    Cells are tried as long as the next one is expected to be done within ``seconds``, in an order that ``seed`` draws.
    """
    started = time.monotonic()
    if not data_file.exists():
        return [f"{data_file.name} is missing; run `{COMMAND}` and commit what it writes"]
    data = read_data(data_file)
    found = list(stale_parts(data, page))
    here = versions_here()
    other = [f"{name} {here[name]} (not {version})" for name, version in data.versions.items() if here[name] != version]
    if other:
        say(f"model table: with {', '.join(other)} installed, no cell is tried again; `{COMMAND}` makes the page anew")
        return found
    tried = 0
    for row, column in _drawn(data, seed):
        left = seconds - (time.monotonic() - started)
        if row.seconds[column] > left:
            continue
        tried += 1
        found += find_differences(row, try_row(row.table, row.key, [column]))
    say(f"model table: {tried} cells tried again, drawn by --seed {seed}")
    return found


def stale_parts(data: TableData, page: Path) -> Iterator[str]:
    """Yield what is stale without trying anything: rows and columns that are missing or too many, the page's text."""
    known, expected = {(row.table, row.key): row for row in data.rows}, all_keys()
    for table, key in expected:
        row = known.get((table, key))
        missing = list(TABLES[table].columns) if row is None else TABLES[table].columns.keys() - row.cells.keys()
        if missing:
            yield f"{key!r} has no {', '.join(sorted(missing))}; run `{COMMAND} --only {key!r}`"
    for table, key in known.keys() - set(expected):
        yield f"{key!r} is a row of the data, but none of the {table} any more; run `{COMMAND} --page`"
    if not page.exists() or page.read_text(encoding="utf-8") != model_page(data):
        yield f"{page.name} is not what the data gives; run `{COMMAND} --page`"


def find_differences(row: TriedRow, again: TriedRow) -> list[str]:
    """Return a sentence for each cell that came out otherwise; how a refusal is worded is no difference."""
    return [
        f"{row.key!r}, {column}: the page says {_said(row.cells[column])}, a trial now {_said(cell)}; "
        f"run `{COMMAND} --only {row.key!r}` if that is meant"
        for column, cell in again.cells.items()
        if cell.value != row.cells[column].value
    ]


def _said(cell: Outcome) -> str:
    return f"{cell.value!r} ({cell.note})" if cell.note else repr(cell.value)


def _drawn(data: TableData, seed: int) -> list[tuple[TriedRow, str]]:
    """Return one cell of each row that still is one, in a random order, fusers' and backbones' by turns."""
    chance = random.Random(seed)
    drawn: dict[str, list[tuple[TriedRow, str]]] = {name: [] for name in TABLES}
    for row in data.rows:
        columns = sorted(TABLES[row.table].columns.keys() & row.cells.keys())
        if row.key in TABLES[row.table].rows and columns:
            drawn[row.table].append((row, chance.choice(columns)))
    for cells in drawn.values():
        chance.shuffle(cells)
    longest = max(map(len, drawn.values()))
    return [cells[place] for place in range(longest) for cells in drawn.values() if place < len(cells)]
