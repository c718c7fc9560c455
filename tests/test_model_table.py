"""The model table's tool: a trial that fails is a cell, and a page that is no longer true is found."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from layerfuse.errors import InputError
from layerfuse.fusers import FUSERS
from tools.model_table.backbone_columns import check_close
from tools.model_table.backbones import BACKBONE_ROWS
from tools.model_table.cells import DifferenceError, Outcome, TrialColumn, attempt
from tools.model_table.check import check_table
from tools.model_table.data import TableData, TriedRow, read_data, versions_here, write_data
from tools.model_table.page import model_page
from tools.model_table.tables import TABLES, Table, all_keys, try_row


def test_the_rows_are_forty_architectures_and_every_fuser() -> None:
    assert len({row.key for row in BACKBONE_ROWS}) == len(BACKBONE_ROWS) >= 40
    assert {row.family for row in BACKBONE_ROWS} == {"timm", "open_clip", "transformers"}
    ours = {name for name in FUSERS.names() if FUSERS.get(name).__module__.startswith("layerfuse.")}
    assert {name for name, _ in TABLES["fusers"].rows.values()} == ours
    assert len(set(all_keys())) == len(all_keys())


def test_whatever_a_trial_raises_stands_in_its_cell() -> None:
    def refused() -> str:
        raise InputError("images have 3 channels; give 4. More is told here.")

    def broken() -> str:
        try:
            raise RuntimeError("\x1b[96mno kernel\x1b[0m at 0x7f3a for this\nTraceback")
        except RuntimeError as error:
            raise ValueError("wrapped") from error

    assert attempt(lambda: "any") == Outcome("any")
    assert attempt(refused) == Outcome("no", "images have 3 channels")
    assert attempt(broken) == Outcome("error", "RuntimeError: no kernel for this")


def test_numbers_that_are_off_or_not_finite_are_a_difference() -> None:
    expected = torch.tensor([1.0, -2.0])
    check_close(expected + 1e-5, expected, 1e-4)
    for actual in (expected + 1e-2, expected * float("nan")):
        with pytest.raises(DifferenceError):
            check_close(actual, expected, 1e-4)


def test_cells_of_a_fuser_are_tried() -> None:
    row = try_row("fusers", "average", ["maps", "grids", "widths", "text"])
    assert logging.root.manager.disable == logging.NOTSET  # silenced for the trial alone
    assert {column: cell.value for column, cell in row.cells.items()} == {
        "maps": "any",
        "grids": "no",
        "widths": "no",
        "text": "no",
    }
    assert row.cells["text"].note == "fuser 'average' takes no condition"


class _Files:
    """Data and page of a table of two rows with columns that count their trials."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data, self.page = folder / "models.jsonl", folder / "models.md"
        self.said: list[str] = []
        self.tried: list[str] = []
        columns = dict.fromkeys(TABLES["fusers"].columns, TrialColumn(self._try))
        monkeypatch.setitem(TABLES, "backbones", Table({}, str, TABLES["backbones"].columns))
        monkeypatch.setitem(TABLES, "fusers", Table({"red": "red", "blue": "blue"}, str, columns))
        self.result = "yes"
        self.write()

    def _try(self, trial: str) -> str:
        self.tried.append(trial)
        if self.result == "crash":
            raise RuntimeError("no such kernel")
        return self.result

    def write(self, versions: dict[str, str] | None = None, keys: tuple[str, ...] = ("red", "blue")) -> None:
        rows = [try_row("fusers", key) for key in keys]
        write_data(versions or versions_here(), rows, self.data)
        self.page.write_text(model_page(read_data(self.data)), encoding="utf-8")
        self.tried.clear()

    def check(self, seconds: float = 5.0, seed: int = 0) -> list[str]:
        return check_table(seconds=seconds, seed=seed, data_file=self.data, page=self.page, say=self.said.append)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Files:
    return _Files(tmp_path, monkeypatch)


def test_a_true_page_passes_and_one_cell_of_each_row_is_tried(files: _Files) -> None:
    assert files.check() == []
    assert sorted(files.tried) == ["blue", "red"]
    assert files.said == ["model table: 2 cells tried again, drawn by --seed 0"]


@pytest.mark.parametrize(("result", "now"), [("any", "'any'"), ("crash", "'error' (RuntimeError: no such kernel)")])
def test_a_cell_that_comes_out_otherwise_is_told_with_the_command(files: _Files, result: str, now: str) -> None:
    files.result = result
    found = files.check()
    assert len(found) == 2
    sentence = next(each for each in found if each.startswith("'red', "))
    assert f": the page says 'yes', a trial now {now}; run `python -m tools.model_table --only 'red'`" in sentence


def test_seeds_draw_other_cells_and_time_that_is_up_stops_trials(files: _Files) -> None:
    files.result = "any"
    assert len({tuple(files.check(seed=seed)) for seed in range(5)}) > 1
    files.tried.clear()
    assert files.check(seconds=0.0) == [] and files.tried == []


def test_a_missing_row_and_an_edited_page_are_stale(files: _Files) -> None:
    files.write(keys=("red",))
    assert any("'blue' has no AnyRes, FLOPs, ONNX" in each for each in files.check(seconds=0.0))
    files.write()
    files.page.write_text(files.page.read_text(encoding="utf-8").replace("`red`", "`pink`"), encoding="utf-8")
    assert files.check(seconds=0.0) == [
        "models.md is not what the data gives; run `python -m tools.model_table --page`"
    ]
    files.data.unlink()
    assert files.check() == ["models.jsonl is missing; run `python -m tools.model_table` and commit what it writes"]


def test_cells_of_other_versions_are_not_held_against_these(files: _Files) -> None:
    files.write({**versions_here(), "torch": "1.0"})
    files.result = "any"
    assert files.check() == [] and files.tried == []
    assert "torch" in files.said[0] and "(not 1.0) installed, no cell is tried again" in files.said[0]


def test_reasons_stand_once_under_their_table() -> None:
    columns = TABLES["fusers"].columns
    row = TriedRow("fusers", "a", dict.fromkeys(columns, Outcome("no", "a_b < c")), {})
    page = model_page(TableData({}, (row, TriedRow("fusers", "b", dict.fromkeys(columns, Outcome("yes")), {}))))
    assert f"| `a` |{' no<sup>1</sup> |' * len(columns)}" in page
    assert f"| `b` |{' ✓ |' * len(columns)}" in page
    assert page.count("1. a\\_b &lt; c") == 1
