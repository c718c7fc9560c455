"""What was tried, as lines of JSON beside the page: versions first, then one line a row."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from layerfuse.files import write_text
from tools.model_table.cells import Outcome

__all__ = ["DATA", "TableData", "TriedRow", "read_data", "versions_here", "write_data"]

DATA = Path(__file__).resolve().parents[2] / "docs" / "models.jsonl"
_PACKAGES = ("torch", "timm", "open_clip_torch", "transformers", "onnxruntime")


@dataclass(frozen=True)
class TriedRow:
    """The cells of one row.

    Args:
        table: ``"backbones"`` or ``"fusers"``.
        key: of the row in its table.
        cells: by column.
        seconds: that cells, and the models they need, took; rounded up, for the guess how many can be checked in time.
    """

    table: str
    key: str
    cells: Mapping[str, Outcome]
    seconds: Mapping[str, int]


@dataclass(frozen=True)
class TableData:
    """All rows, and the versions of packages that they were tried with."""

    versions: Mapping[str, str]
    rows: tuple[TriedRow, ...]

    def row(self, table: str, key: str) -> TriedRow | None:
        """Return the row of a key, if there is one."""
        return next((row for row in self.rows if (row.table, row.key) == (table, key)), None)


def versions_here() -> dict[str, str]:
    """Return the versions of the packages on which cells depend."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in _PACKAGES}


def read_data(path: Path = DATA) -> TableData:
    """Return what a file of `write_data` holds."""
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for line in map(json.loads, lines):
        cells = {
            name: Outcome(*([value] if isinstance(value, str) else value)) for name, value in line["cells"].items()
        }
        rows.append(TriedRow(line["table"], line["key"], cells, line["seconds"]))
    return TableData(json.loads(head)["versions"], tuple(rows))


def write_data(versions: Mapping[str, str], rows: Iterable[TriedRow], path: Path = DATA) -> None:
    """Write versions and rows."""
    lines = [json.dumps({"versions": dict(versions)})]
    for row in rows:
        cells = {name: [cell.value, cell.note] if cell.note else cell.value for name, cell in row.cells.items()}
        line = {"table": row.table, "key": row.key, "cells": cells, "seconds": dict(row.seconds)}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")
