"""Charts as SVG, coloured by the page's style sheet so that they follow its light and dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup, escape

__all__ = [
    "Column",
    "Interval",
    "Series",
    "interval_chart",
    "line_chart",
    "marker",
    "nice_ticks",
    "smoothed",
    "thinned",
]

_HEIGHT = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 14, 46
_ROW_NAMES = 116
_COLORS = 8
# A letter of a name, and a line of names, in units of the drawing.
_LETTER, _LINE = 7.5, 15

_CROSS = ((-2, -5), (2, -5), (2, -2), (5, -2), (5, 2), (2, 2), (2, 5), (-2, 5), (-2, 2), (-5, 2), (-5, -2), (-2, -2))
_STAR = tuple(
    (radius * math.sin(math.pi * corner / 5), -radius * math.cos(math.pi * corner / 5))
    for corner, radius in zip(range(10), (6.4, 2.8) * 5, strict=True)
)
# Corners of the marks. With the circle there are nine, so that no two of 72 have both colour and shape in common.
_SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((-5, -5), (5, -5), (5, 5), (-5, 5)),
    ((0, -6), (5, 4), (-5, 4)),
    ((0, -6), (6, 0), (0, 6), (-6, 0)),
    _CROSS,
    ((0, 6), (5, -4), (-5, -4)),
    ((-5, -5.5), (5, -5.5), (1.5, 0), (5, 5.5), (-5, 5.5), (-1.5, 0)),
    _STAR,
    tuple(((x - y) * 0.75, (x + y) * 0.75) for x, y in _CROSS),
)


@dataclass(frozen=True)
class Series:
    """A line through (x, y) points, faint or strong.

    Attributes:
        name: its tooltip.
        points: at least one.
        slot: numbers its colour in the style sheet, and its mark, from 0.
        faint: whether it is thin and pale.
        mark_every: of so many points one has a mark, in each slot another; 0 for none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    slot: int
    faint: bool = False
    mark_every: int = 0


@dataclass(frozen=True)
class Column:
    """A point on the x axis with a name in place of a number, and (y, slot) pairs above it."""

    name: str
    values: Sequence[tuple[float, int]]


@dataclass(frozen=True)
class Interval:
    """A point with a bar of length 2 `error`, in the row called `row`; `name` is its tooltip."""

    row: str
    name: str
    value: float
    error: float
    slot: int


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover a range: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + 1
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    integer_x: bool = False,
    level: tuple[str, float] | None = None,
    columns: Sequence[Column] = (),
    width: int = 520,
) -> Markup:
    """Draw lines over a common x axis, as an ``<svg>`` element.

    Args:
        series: at least one.
        title: for screen readers.
        x_label: with unit.
        y_label: with unit.
        y_range: lowest and highest y; of the points if None.
        integer_x: mark every whole x.
        level: name and y of a dashed horizontal line.
        columns: named points to the right of the lines.
        width: of the drawing; letters are 13 high.
    """
    points = [point for entry in series for point in entry.points]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = nice_ticks(*(y_range or (min(y for _, y in points), max(y for _, y in points))))
    x_ticks = [float(x) for x in range(round(x_low), round(x_high) + 1)] if integer_x else nice_ticks(x_low, x_high, 6)
    if not integer_x:
        x_low, x_high = x_ticks[0], max(x_high, x_ticks[-2] if len(x_ticks) > 1 else x_high)
    # Columns take one unit of x each, between gaps of a half.
    span_high = x_high + (1 + len(columns) if columns else 0)
    scale = _Scale(x_low, span_high, y_ticks[0], y_ticks[-1], width, padding=16 if integer_x else 0)
    parts = [_axes(scale, [x for x in x_ticks if x <= x_high + 1e-9], y_ticks, x_label, y_label, x_high)]
    if level is not None:
        name, y = level
        # Lines run above the level of chance, so its name stands below, unless the axis is there.
        beside = scale.y(y) + 15 if scale.y(y) + 20 < _HEIGHT - _BOTTOM else scale.y(y) - 6
        parts.append(
            f'<line class="level" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{scale.y(y):.1f}" y2="{scale.y(y):.1f}"/>'
            + _text("note", _LEFT + 6, beside, name, anchor="start")
        )
    parts += [_line(entry, scale) for entry in series]
    if columns:
        edge = scale.x(x_high + 0.5)
        parts.append(f'<line class="edge" x1="{edge:.1f}" x2="{edge:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    # Names that are wider than their columns take turns in several lines.
    widest = _LETTER * max((len(column.name) for column in columns), default=0)
    lines = max(1, math.ceil(widest / (scale.x(1) - scale.x(0))))
    for index, column in enumerate(columns):
        x = scale.x(x_high + 1 + index)
        parts.append(_text("tick", x, _HEIGHT - _BOTTOM + 17 + _LINE * (index % lines), column.name))
        parts += [marker(x, scale.y(y), slot, f"{column.name}: {y:.3g}") for y, slot in column.values]
    return _svg(parts, title, width, _HEIGHT + max(0, _LINE * lines + 8 - _BOTTOM))


def interval_chart(intervals: Sequence[Interval], *, title: str, x_label: str) -> Markup:
    """Draw points with error bars around zero, a row a name, as an ``<svg>`` element; see `line_chart`."""
    rows = list(dict.fromkeys(interval.row for interval in intervals))
    lanes = max(sum(interval.row == row for interval in intervals) for row in rows)
    row_height = max(30, 15 * lanes + 8)
    height = _TOP + row_height * len(rows) + _BOTTOM
    finite = [interval.error if math.isfinite(interval.error) else 0.0 for interval in intervals]
    reach = max(max(abs(i.value) + e for i, e in zip(intervals, finite, strict=True)), 1.0)
    ticks = nice_ticks(-reach, reach, 8)
    left, width = _ROW_NAMES, 640
    unit = (width - left - _RIGHT) / (ticks[-1] - ticks[0])

    def place(value: float) -> float:
        return left + (value - ticks[0]) * unit

    bottom = height - _BOTTOM
    parts = []
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        signed = "0" if tick == 0 else f"{tick:+.10g}".replace("-", "\u2212")
        parts.append(_text("tick", place(tick), bottom + 17, signed))
    parts.append(_text("label", (left + width - _RIGHT) / 2, height - 8, x_label))
    for number, row in enumerate(rows):
        centre = _TOP + row_height * (number + 0.5)
        parts.append(_text("row", left - 12, centre + 4, row, anchor="end"))
        bars = [(i, e) for i, e in zip(intervals, finite, strict=True) if i.row == row]
        for lane, (interval, error) in enumerate(bars):
            y = centre + 15 * (lane - (len(bars) - 1) / 2)
            low, high = place(interval.value - error), place(interval.value + error)
            css = f"bar c{interval.slot % _COLORS}"
            parts.append(f'<line class="{css}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(marker(place(interval.value), y, interval.slot, interval.name))
    return _svg(parts, title, width, height)


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: int
    padding: float = 0.0

    def x(self, value: float) -> float:
        room = self.width - _LEFT - _RIGHT - 2 * self.padding
        return _LEFT + self.padding + room * (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)

    def y(self, value: float) -> float:
        height = _HEIGHT - _TOP - _BOTTOM
        return _TOP + height * (1 - (value - self.y_low) / ((self.y_high - self.y_low) or 1.0))


def _axes(
    scale: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str, x_high: float
) -> str:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for tick in y_ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{scale.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", _LEFT - 8, y + 4, _plain(tick), anchor="end"))
    parts += [_text("tick", scale.x(tick), bottom + 17, _plain(tick)) for tick in x_ticks]
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{scale.width - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (scale.x(scale.x_low) + scale.x(x_high)) / 2
    parts.append(_text("label", middle, _HEIGHT - 8, x_label))
    y = (_TOP + bottom) / 2
    parts.append(_text("label", 14, y, y_label, extra=f' transform="rotate(-90 14 {y:.1f})"'))
    return "".join(parts)


def _line(entry: Series, scale: _Scale) -> str:
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in entry.points)
    color = entry.slot % _COLORS
    css = f"line c{color}{' faint' if entry.faint else ''}"
    line = f'<polyline class="{css}" points="{path}"><title>{escape(entry.name)}</title></polyline>'
    # Lines that run together have their marks at different places.
    every = entry.mark_every
    marked = entry.points[color * every // _COLORS :: every] if every else ()
    return line + "".join(
        marker(scale.x(x), scale.y(y), entry.slot, f"{entry.name}, {_plain(x)}: {y:.3g}") for x, y in marked
    )


def marker(x: float, y: float, slot: int, tooltip: str) -> Markup:
    """Draw a mark around (x, y), in units of the ``<svg>``; the slot gives colour and shape, never colour alone."""
    corners = _SHAPES[slot % len(_SHAPES)]
    hint = f"<title>{escape(tooltip)}</title>"
    css = f'class="mark c{slot % _COLORS}"'
    if not corners:
        return Markup(f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="4.5">{hint}</circle>')
    points = " ".join(f"{x + dx * 0.9:.1f},{y + dy * 0.9:.1f}" for dx, dy in corners)
    return Markup(f'<polygon {css} points="{points}">{hint}</polygon>')


def _text(css: str, x: float, y: float, text: str, *, anchor: str = "middle", extra: str = "") -> str:
    return f'<text class="{css}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}"{extra}>{escape(text)}</text>'


def _plain(value: float) -> str:
    return f"{value:,.10g}".replace(",", "\u202f")


def _svg(parts: Sequence[str], title: str, width: float, height: float) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
    # The parts are built from numbers and escaped text only.
    return Markup(head + "".join(parts) + "</svg>")


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average over a window of a twentieth of the curve, centred."""
    half = max(1, len(points) // 40)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(x, fmean(y for _, y in window)) for (x, _), window in zip(points, windows, strict=True)]


def thinned(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """Keep at most about `most` points, the last among them."""
    stride = max(1, -(-len(points) // most))
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
