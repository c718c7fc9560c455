from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integrations.llava.study.report.charts import (
    Column,
    Interval,
    Series,
    interval_chart,
    line_chart,
    marker,
    nice_ticks,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0, 3.4, [0, 1, 2, 3, 4]), (-7, 7, [-10, -5, 0, 5, 10]), (2, 2, None)],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, ticks: list[float] | None) -> None:
    found = nice_ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    if ticks is not None:
        assert found == ticks


@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-3, 1e6), count=st.integers(1, 12))
def test_ticks_ascend_and_stay_few(low: float, size: float, count: int) -> None:
    found = nice_ticks(low, low + size, count)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= count + 3


def numbers(svg: str, name: str) -> list[float]:
    tree = ET.fromstring(svg)
    return [float(element.attrib[name]) for element in tree.iter() if name in element.attrib]


def test_line_chart_is_well_formed_and_stays_inside_its_frame() -> None:
    svg = line_chart(
        [Series("a & b", [(0, 0.0), (6, 100.0)], slot=0, mark_every=1), Series("c", [(0, 50.0)], slot=1, faint=True)],
        title="<title>",
        x_label="layer",
        y_label="right (%)",
        y_range=(0, 100),
        integer_x=True,
        level=("commonest", 6.0),
        columns=[Column("mmfuser", [(60.0, 1)])],
    )
    tree = ET.fromstring(svg)
    width, height = map(float, tree.attrib["viewBox"].split()[2:])
    assert tree.attrib["aria-label"] == "<title>"
    assert all(0 <= x <= width for name in ("x", "x1", "x2", "cx") for x in numbers(svg, name))
    assert all(0 <= y <= height for name in ("y", "y1", "y2", "cy") for y in numbers(svg, name))
    texts = [element.text for element in tree.iter() if element.text]
    assert {"layer", "right (%)", "commonest", "mmfuser", "0", "6"} <= set(texts)


def test_line_chart_of_one_point_does_not_divide_by_zero() -> None:
    ET.fromstring(line_chart([Series("a", [(1, 2.0)], slot=0)], title="t", x_label="step", y_label="loss"))


def test_interval_chart_has_a_row_a_name_and_ignores_infinite_errors() -> None:
    svg = interval_chart(
        [
            Interval("ocr", "mmfuser, ocr", 4.0, 2.0, slot=1),
            Interval("ocr", "concat, ocr", -3.0, math.inf, slot=2),
            Interval("box", "mmfuser, box", 0.0, 0.0, slot=1),
        ],
        title="difference",
        x_label="points",
    )
    texts = [element.text for element in ET.fromstring(svg).iter() if element.text]
    assert texts.count("ocr") == texts.count("box") == 1
    assert "inf" not in svg
    assert "nan" not in svg


def test_no_two_of_many_slots_share_colour_and_shape() -> None:
    marks = [marker(0, 0, slot, "") for slot in range(72)]
    assert len(set(marks)) == 72
    shapes = [re.sub(r"c\d", "", mark) for mark in marks]
    assert all(len(set(shapes[first : first + 9])) == 9 for first in range(64))


@pytest.mark.parametrize("count", [2, 7, 12])
def test_long_names_of_columns_stay_apart_and_inside(count: int) -> None:
    names = [f"connector_{index:05d}" for index in range(count)]
    svg = line_chart(
        [Series("probe", [(layer, 50.0) for layer in range(7)], slot=7)],
        title="t",
        x_label="layer",
        y_label="right (%)",
        integer_x=True,
        columns=[Column(name, [(60.0, slot)]) for slot, name in enumerate(names)],
        width=960,
    )
    tree = ET.fromstring(svg)
    width, height = map(float, tree.attrib["viewBox"].split()[2:])
    found = [(float(text.attrib["x"]), float(text.attrib["y"])) for text in tree.iter() if text.text in names]
    assert len(found) == count
    half = 15 * 7.5 / 2
    for x, y in found:
        assert half <= x <= width - half and y <= height - 4
        assert all(abs(x - other) >= 2 * half for other, line in found if line == y and other != x)


def test_lines_that_run_together_are_marked_at_different_places() -> None:
    points = [(float(step), 1.0) for step in range(60)]
    svg = line_chart(
        [Series("a", points, slot=0, mark_every=10), Series("b", points, slot=5, mark_every=10)],
        title="t",
        x_label="step",
        y_label="loss",
    )
    marked = [title.text for title in ET.fromstring(svg).iter("title") if "," in (title.text or "")]
    assert [text for text in marked if text.startswith("a")] == [f"a, {step}: 1" for step in range(0, 60, 10)]
    assert [text for text in marked if text.startswith("b")] == [f"b, {step}: 1" for step in range(6, 60, 10)]
