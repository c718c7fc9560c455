"""Tables as text keep to the width that they are given, and lose nothing by it."""

from __future__ import annotations

import pytest

from integrations.llava.evaluation.tables.content import Cell, ComparisonTable, TableColumn, TableRow
from integrations.llava.evaluation.tables.stored import MissingTask, TablePlan
from integrations.llava.evaluation.tables.text import TEXT_WIDTH, as_text

OURS = ("a-checkpoint-of-a-long-name", "another-checkpoint")
PUBLISHED = ("LLaVA-1.5 7B", "LLaVA-1.5 7B LoRA", "MMFuser 7B")


def table() -> ComparisonTable:
    """Two checkpoints, three published models; cells that are different numbers."""
    columns = [TableColumn(name, "llava", "ours") for name in OURS]
    columns += [TableColumn(name, "llava", "published") for name in PUBLISHED]
    cells = [Cell("ours", 10.5 + n, (10.0 + n, 11.0 + n), notes=("judged by somebody " * 8,)) for n in range(2)]
    cells += [Cell("published", 50.5 + n, source="a paper") for n in range(3)]
    pairs = [f"{one} − {other}" for one in OURS for other in PUBLISHED]
    differences = [Cell("difference", 20.5 + n) for n in range(5)]
    rows = (TableRow("mme", "MME", False, (*differences, Cell("none"))),)
    rows += (TableRow("mme:cognition", "cognition", True, (*[Cell("none")] * 5, Cell("difference", 70.5))),)
    return ComparisonTable(
        "general",
        "General benchmarks",
        tuple(columns),
        (TableRow("mme", "MME", False, tuple(cells)),),
        tuple(TableColumn(name, "llava", "difference") for name in pairs),
        rows,
    )


PLAN = TablePlan(
    missing={"pope": MissingTask("missing", "no file of it is there " * 6, (("p/" * 70, "labels", "web"),))}
)


@pytest.mark.parametrize("width", [60, 100, 160, 400])
def test_lines_are_as_long_as_the_terminal_is_wide_and_every_number_is_there(width: int) -> None:
    text = as_text([table()], PLAN, width=width)
    assert max(len(line) for line in text.splitlines() if "p/p/" not in line) <= width
    assert "p/" * 70 in text  # a path stays whole
    for row in (*table().rows, *table().differences):
        for cell in row.cells:
            assert cell.text in text
    for name in (*OURS, *PUBLISHED, "− MMFuser 7B"):
        assert name in text


def test_columns_that_find_no_room_stand_below_behind_the_titles_of_their_rows() -> None:
    lines = as_text([table()], PLAN, width=400).splitlines()
    assert [line.split() for line in lines if line.startswith("MME")][1][1:] == [f"+{20.5 + n}" for n in range(5)]
    assert [line.count("− ") for line in lines if "− " in line] == [6]

    narrow = as_text([table()], PLAN, width=TEXT_WIDTH)
    assert narrow.count("\nMME ") > 2
    # A row stands where it has numbers.
    assert narrow.count("\n  cognition ") == 1
    assert as_text([table()], PLAN) == narrow
