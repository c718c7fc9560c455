"""The tables as values: which number stands in which cell, what it was made with, and how numbers differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from ..task import TASKS, Task
from .bootstrap import difference_interval, percentile_interval
from .published import PublishedModel, published_models
from .stored import MissingTask, TablePlan, TaskResult, read_result, task_folder

__all__ = ["Cell", "ComparisonTable", "TableColumn", "TableRow", "build_tables"]

_TITLES = {
    "general": "General benchmarks",
    "ocrbench": "OCRBench by category",
    "caption": "Region captions (CIDEr)",
    "comprehension": "Referring expressions (accuracy at IoU of at least 0.5)",
    "extra": "Further benchmarks",
}
_AVERAGED = {"caption": 8, "comprehension": 8}
_WORDS = {
    "written": "submission written",
    "missing": "data missing",
    "unseen": "not seen",
    "unfinished": "not evaluated",
    "none": "",
}

State = Literal["ours", "entered", "published", "difference", "written", "missing", "unseen", "unfinished", "none"]


@dataclass(frozen=True)
class Cell:
    """A number as tables show it, with its 95 % interval, or the reason why there is none.

    Attributes:
        state: what the number is, or why it is missing.
        value: in per cent, or points.
        interval: None where nothing was drawn: servers' scores, published ones.
        digits: behind the point.
        notes: what a reader has to know.
        source: of a published number.
        draws: of ours; differences are worked out from them.
        questions: tells whether two numbers are of the same questions.
    """

    state: State
    value: float | None = None
    interval: tuple[float, float] | None = None
    digits: int = 1
    notes: tuple[str, ...] = ()
    source: str = ""
    draws: Sequence[float] = field(default=(), repr=False)
    questions: str = ""

    @property
    def text(self) -> str:
        """What stands in the cell."""
        if self.value is None:
            return _WORDS[self.state]
        shown = self._number(self.value)
        if self.interval is not None:
            low, high = map(self._number, self.interval)
            shown += f" [{low}, {high}]"
        return f"{shown} (entered)" if self.state == "entered" else shown

    def _number(self, value: float) -> str:
        """Rounded, with a sign if it is a difference that is not 0."""
        shown = f"{abs(value):.{self.digits}f}"
        if not float(shown):
            return shown
        plus = "+" if self.state == "difference" else ""
        return ("\u2212" if value < 0 else plus) + shown


@dataclass(frozen=True)
class TableColumn:
    """A checkpoint under a protocol, a published model, or the difference of two columns."""

    name: str
    protocol: str
    kind: Literal["ours", "published", "difference"]


@dataclass(frozen=True)
class TableRow:
    """A number in all columns.

    Attributes:
        key: task; ``task:part``; or ``group:average``.
        title: in words.
        is_part: whether it is a part of the row above.
        cells: one per column.
    """

    key: str
    title: str
    is_part: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ComparisonTable:
    """One of the paper's tables: scores, and below them differences of the same rows."""

    group: str
    title: str
    columns: tuple[TableColumn, ...]
    rows: tuple[TableRow, ...]
    difference_columns: tuple[TableColumn, ...]
    differences: tuple[TableRow, ...]


def build_tables(plan: TablePlan, output: str | Path) -> list[ComparisonTable]:
    """Fill the tables of what was asked for with what stands in a folder; numbers that are not there are words."""
    groups: dict[str, list[str]] = {name: [] for name in _TITLES}
    for name in plan.tasks:
        groups[TASKS.get(name).group].append(name)
    return [_table(group, names, plan, Path(output)) for group, names in groups.items() if names]


def _table(group: str, names: Sequence[str], plan: TablePlan, output: Path) -> ComparisonTable:
    tasks = {name: TASKS.get(name) for name in names}
    pairs = dict.fromkeys(
        (checkpoint, protocol or task.protocols[0])
        for checkpoint, protocol in plan.columns
        for task in tasks.values()
        if protocol is None or protocol in task.protocols
    )
    models = [
        own
        for own in published_models()
        if plan.published in (own.size, "both") and any(_names_task(key, group, names) for key in own.numbers)
    ]
    columns = [TableColumn(checkpoint, protocol, "ours") for checkpoint, protocol in pairs]
    columns += [TableColumn(own.name, own.protocol, "published") for own in models]
    rows = []
    for name, task in tasks.items():
        results = {pair: read_result(task_folder(output, *pair, name)) for pair in pairs}
        for part in ("", *task.parts):
            cells = [_own_cell(task, part, plan, results[pair], pair, plan.missing.get(name)) for pair in pairs]
            key = f"{name}:{part}" if part else name
            cells += [_published_cell(own, key, _digits(task)) for own in models]
            rows.append(TableRow(key, task.parts[part] if part else task.title or name, bool(part), tuple(cells)))
    if group in _AVERAGED:
        rows.append(_average(group, [own for own in rows if not own.is_part], len(pairs), models))
    compared = _compared(columns)
    return ComparisonTable(
        group,
        _TITLES[group],
        tuple(columns),
        tuple(rows),
        tuple(
            TableColumn(f"{columns[one].name} − {columns[other].name}", columns[one].protocol, "difference")
            for one, other in compared
        ),
        tuple(
            own
            for row in rows
            for own in [replace(row, cells=tuple(_difference(row.cells[i], row.cells[j]) for i, j in compared))]
            if any(cell.value is not None for cell in own.cells)
        ),
    )


def _compared(columns: Sequence[TableColumn]) -> list[tuple[int, int]]:
    """Pairs of columns whose difference is shown: each checkpoint and the first, then each and published models."""
    ours = [index for index, own in enumerate(columns) if own.kind == "ours"]
    firsts = {columns[index].protocol: index for index in reversed(ours)}
    pairs = [(index, firsts[columns[index].protocol]) for index in ours]
    return [(one, other) for one, other in pairs if one != other] + [
        (one, other)
        for one in ours
        for other, own in enumerate(columns)
        if own.kind == "published" and own.protocol == columns[one].protocol
    ]


def _names_task(key: str, group: str, names: Sequence[str]) -> bool:
    return key.partition(":")[0] in (group, *names)


def _digits(task: type[Task]) -> int:
    return 0 if task.group == "ocrbench" else 1


def _own_cell(
    task: type[Task],
    part: str,
    plan: TablePlan,
    result: TaskResult | None,
    pair: tuple[str, str],
    missing: MissingTask | None,
) -> Cell:
    checkpoint, protocol = pair
    asked = any(
        checkpoint == own and protocol == (said or task.protocols[0]) and protocol in task.protocols
        for own, said in plan.columns
    )
    if result is None:
        return Cell("none" if not asked else "missing" if missing else "unfinished")
    number = part or task.metric
    notes = (result.note,) if result.note and not part else ()
    if number not in result.numbers:
        if result.added is not None and not part:
            return Cell("entered", result.added, digits=_digits(task), notes=notes)
        return Cell("none" if part else "written", notes=notes)
    times = 100.0 if task.shown_as == "percent" else 1.0
    draws = [times * own for own in result.draws.get(number, ())]
    return Cell(
        "ours",
        times * result.numbers[number],
        percentile_interval(draws),
        _digits(task),
        notes,
        draws=draws,
        questions=result.questions,
    )


def _published_cell(model: PublishedModel, key: str, digits: int) -> Cell:
    own = model.numbers.get(key)
    if own is None:
        return Cell("unseen")
    return Cell("published", own.value, None, digits, (own.note,) if own.note else (), own.source)


def _average(group: str, rows: Sequence[TableRow], num_ours: int, models: Sequence[PublishedModel]) -> TableRow:
    """The mean over the paper's splits, of columns that have them all."""
    wanted = [own for own in rows if not own.key.endswith("_outline")]
    cells = []
    for index in range(num_ours):
        own = [row.cells[index] for row in wanted]
        values = [cell.value for cell in own if cell.state == "ours" and cell.value is not None]
        if len(values) != len(own) or len(own) != _AVERAGED[group]:
            cells.append(Cell("unfinished" if any(cell.state != "none" for cell in own) else "none"))
            continue
        draws = [fmean(each) for each in zip(*(cell.draws for cell in own), strict=True)] if own[0].draws else []
        together = " ".join(cell.questions for cell in own)
        cells.append(Cell("ours", fmean(values), percentile_interval(draws), draws=draws, questions=together))
    key = f"{group}:average"
    cells += [_published_cell(model, key, 1) for model in models]
    return TableRow(key, "mean of the eight splits", False, tuple(cells))


def _difference(one: Cell, other: Cell) -> Cell:
    if one.value is None or other.value is None:
        return Cell("none")
    same = one.questions == other.questions and one.questions
    interval = difference_interval(one.draws, other.draws) if same else None
    return Cell("difference", one.value - other.value, interval, one.digits)
