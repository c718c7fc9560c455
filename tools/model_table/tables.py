"""The two tables, their rows and columns, and how cells of a row are tried."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tools.model_table.backbone_columns import BACKBONE_COLUMNS, BackboneTrial
from tools.model_table.backbones import BACKBONE_ROWS
from tools.model_table.cells import TrialColumn, attempt
from tools.model_table.data import TriedRow
from tools.model_table.fusers import FUSER_COLUMNS, FuserTrial, fuser_forms

__all__ = ["TABLES", "Table", "all_keys", "try_row"]


@dataclass(frozen=True)
class Table:
    """Rows and columns of one table.

    Args:
        rows: what a trial is made of, by key.
        trial: makes the trial of a row.
        columns: what is tried of it.
    """

    rows: Mapping[str, Any]
    trial: Callable[[Any], Any]
    columns: Mapping[str, TrialColumn]


TABLES: dict[str, Table] = {
    "backbones": Table({row.key: row for row in BACKBONE_ROWS}, BackboneTrial, BACKBONE_COLUMNS),
    "fusers": Table(fuser_forms(), FuserTrial, FUSER_COLUMNS),
}


def all_keys() -> list[tuple[str, str]]:
    """Return table and key of every row, in the order of the page."""
    return [(name, key) for name, table in TABLES.items() for key in table.rows]


def try_row(name: str, key: str, columns: Iterable[str] | None = None) -> TriedRow:
    """Try the cells of one row, all of them unless ``columns`` are named."""
    table = TABLES[name]
    trial = table.trial(table.rows[key])
    cells, seconds, built = {}, {}, dict[str, float]()
    for column in table.columns if columns is None else columns:
        for need in table.columns[column].needs:
            if need not in built:
                built[need] = _seconds(lambda need=need: getattr(trial, need))[0]  # type: ignore[misc]
        took, cells[column] = _seconds(lambda column=column: table.columns[column].tried(trial))  # type: ignore[misc]
        seconds[column] = math.ceil(took + sum(built[need] for need in table.columns[column].needs))
    return TriedRow(name, key, cells, seconds)


def _seconds(trial: Callable[[], Any]) -> tuple[float, Any]:
    started, before = time.process_time(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cell = attempt(trial)
    finally:
        logging.disable(before)
    return time.process_time() - started, cell
