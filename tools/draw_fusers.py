"""The picture of docs/fusers.md: what each fuser does with four maps, and which tokens come out.

python -m tools.draw_fusers docs/fusers.png
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from PIL import Image

__all__ = ["PANELS", "draw_fusers"]

# Pixels of the picture as it is drawn; it is stored with twice as many.
_WIDTH, _PANEL, _HEAD, _COLUMNS = 1000, 206, 62, 4
_INK, _GREY, _LEARNED = "#0f172a", "#475569", "#ea580c"
# Of the four maps, from the shallow to the deep one, which is the query; and of another backbone's.
_LAYERS = ("#bfdbfe", "#60a5fa", "#2563eb", "#1e3a8a")
_OTHER = "#16a34a"
_MAP, _OUT = 28, 60
_OUT_AT = (156, 78)
_TOP = 44

Point = tuple[float, float]


def _mix(colors: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """The weighted mean of colours."""
    weights = weights or [1.0] * len(colors)
    channels = zip(*(to_rgb(color) for color in colors), strict=True)
    red, green, blue = (
        sum(w * value for w, value in zip(weights, channel, strict=True)) / sum(weights) for channel in channels
    )
    return to_hex((red, green, blue))


class _Panel:
    """One fuser's place in the picture; y grows downwards.

    Args:
        axes: of the whole picture.
        corner: upper left one of the panel.
    """

    def __init__(self, axes: Axes, corner: Point) -> None:
        self.axes, self.corner = axes, corner

    def _at(self, x: float, y: float) -> Point:
        return self.corner[0] + x, self.corner[1] + y

    def grid(self, at: Point, size: float, colors: str | Sequence[str], cells: int = 4, alpha: float = 1.0) -> None:
        """Tokens of one map; `colors` are one for all or one for each cell, row by row."""
        edge = size / cells
        for index, (row, column) in enumerate(product(range(cells), repeat=2)):
            color = colors if isinstance(colors, str) else colors[index]
            corner = self._at(at[0] + column * edge, at[1] + row * edge)
            self.axes.add_patch(Rectangle(corner, edge, edge, facecolor=color, edgecolor="white", lw=0.8, alpha=alpha))

    def maps(self, used: Sequence[int] = (0, 1, 2, 3)) -> list[Point]:
        """The four maps, the deep one on top; the middle of the right side of each, from the shallow one on."""
        ends: list[Point] = []
        for index, color in enumerate(_LAYERS):
            at = (14, _TOP + (3 - index) * (_MAP + 5))
            self.grid(at, _MAP, color, alpha=1.0 if index in used else 0.3)
            ends.append((at[0] + _MAP + 3, at[1] + _MAP / 2))
        return ends

    def line(self, start: Point, end: Point, color: str = _GREY, width: float = 1.2, arrow: bool = False) -> None:
        """A line, or an arrow."""
        style = {"arrowstyle": "-|>" if arrow else "-", "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", self._at(*end), self._at(*start), arrowprops=style)

    def text(self, at: Point, text: str, size: float = 12, color: str = _INK, **style: str) -> None:
        """Words, in pixels of height."""
        where = {"ha": "center", "va": "center"} | style
        self.axes.text(*self._at(*at), text, fontsize=size * 0.72, color=color, **where)  # type: ignore[arg-type]

    def step(self, text: str, at: Point = (104, 108), color: str = _INK, radius: float = 17) -> Point:
        """A circle with what is done, and an arrow to what comes out; the circle's left side."""
        self.axes.add_patch(Circle(self._at(*at), radius, facecolor="white", edgecolor=color, lw=1.3))
        self.text(at, text, color=color)
        self.line((at[0] + radius, at[1]), (_OUT_AT[0] - 6, 108), arrow=True)
        return at[0] - radius, at[1]

    def out(self, *plates: str | Sequence[str], cells: int = 4) -> None:
        """What comes out; several plates are channels side by side."""
        for place in reversed(range(len(plates))):
            self.grid((_OUT_AT[0] + 7 * place, _OUT_AT[1] - 7 * place), _OUT, plates[place], cells)

    def weights(self, ends: Sequence[Point], target: Point, widths: Sequence[float]) -> None:
        """Learned weights: lines of several widths."""
        for end, width in zip(ends, widths, strict=True):
            self.line(end, target, _LEARNED, width)

    def frame(self, at: Point, edge: float) -> None:
        """A square that is looked at."""
        self.axes.add_patch(Rectangle(self._at(*at), edge, edge, facecolor="none", edgecolor=_LEARNED, lw=1.8))

    def dots(self, points: Sequence[Point]) -> None:
        """Points that are read."""
        for point in points:
            self.axes.add_patch(Circle(self._at(*point), 2.2, facecolor=_LEARNED, edgecolor="white", lw=0.5))


def _select(panel: _Panel) -> None:
    *_, query = panel.maps(used=(3,))
    panel.line(query, (_OUT_AT[0] - 6, 108), arrow=True)
    panel.out(_LAYERS[3])


def _average(panel: _Panel) -> None:
    ends = panel.maps()
    target = panel.step("mean", radius=20)
    for end in ends:
        panel.line(end, target)
    panel.out(_mix(_LAYERS))


def _scalar_mix(panel: _Panel) -> None:
    weights = (0.8, 4.5, 2.2, 3.4)
    panel.weights(panel.maps(), panel.step("Σ"), weights)
    panel.out(_mix(_LAYERS, weights))


def _depth_attention(panel: _Panel) -> None:
    panel.weights(panel.maps(), panel.step("Σ"), (2, 2, 2, 2))
    patches = (3, 3, 1, 0, 3, 2, 1, 1, 2, 2, 3, 1, 0, 2, 3, 3)
    panel.out([_LAYERS[patch] for patch in patches])


def _concat(panel: _Panel) -> None:
    for end in panel.maps():
        panel.line(end, (_OUT_AT[0] - 8, 108))
    panel.out(*_LAYERS)


def _dense_connector(panel: _Panel) -> None:
    ends = panel.maps()
    for group, y in ((ends[:2], 141), (ends[2:], 84)):
        left = panel.step("mean", (104, y), radius=20)
        for end in group:
            panel.line(end, left)
    panel.line(ends[3], (_OUT_AT[0] - 6, 62), arrow=True)
    panel.out(_LAYERS[3], _mix(_LAYERS[:2]), _mix(_LAYERS[2:]))


def _token_concat(panel: _Panel) -> None:
    for index, end in enumerate(panel.maps()):
        panel.line(end, (_OUT_AT[0] + 10, end[1]), arrow=True)
        panel.grid((_OUT_AT[0] + 16, _TOP + (3 - index) * _MAP + 8), _MAP, _LAYERS[index])


def _cell(index: int, row: int, column: int) -> Point:
    """Middle of a cell of one of the four maps."""
    edge = _MAP / 4
    return 14 + (column + 0.5) * edge, _TOP + (3 - index) * (_MAP + 5) + (row + 0.5) * edge


def _mmfuser(panel: _Panel) -> None:
    panel.maps()
    source = (panel.step("q + Σ", radius=22)[0], 108)
    points = [(2.2, 0.8), (0.6, 2.6), (2.9, 2.4)]
    reads = [_cell(index, 0, 0) for index in range(3)]
    reads = [(x + 7 * column, y + 7 * row) for x, y in reads for row, column in points]
    for point in reads:
        panel.line(point, source, _LEARNED, 0.8)
    panel.line(_cell(3, 1, 2), source)
    panel.dots(reads)
    panel.frame((_cell(3, 1, 2)[0] - 3.5, _cell(3, 1, 2)[1] - 3.5), 7)
    panel.out(_mix(_LAYERS, (1, 1, 1, 4)))


def _cross_attention(panel: _Panel) -> None:
    panel.maps()
    source = (panel.step("q + Σ", radius=22)[0], 108)
    for index, row, column in product(range(3), range(4), range(4)):
        panel.line(_cell(index, row, column), source, _LEARNED, 0.35)
    panel.line(_cell(3, 1, 2), source)
    panel.frame((_cell(3, 1, 2)[0] - 3.5, _cell(3, 1, 2)[1] - 3.5), 7)
    panel.out(_mix(_LAYERS, (1, 1, 1, 4)))


def _attention_pool(panel: _Panel) -> None:
    panel.maps(used=(2, 3))
    target = panel.step("Σ")
    for index in (2, 3):
        corner = _cell(index, 0, 2)
        panel.frame((corner[0] - 3.5, corner[1] - 3.5), 14)
        panel.line((corner[0] + 11, corner[1] + 3), target, _LEARNED, 1.6)
    panel.out(_mix(_LAYERS[2:]), cells=2)
    panel.frame((_OUT_AT[0] + _OUT / 2, _OUT_AT[1]), _OUT / 2)


def _spatial_aggregator(panel: _Panel) -> None:
    target = panel.step("Σ")
    for y, color, cells in ((38, _LAYERS[3], 4), (84, _LAYERS[1], 4), (130, _OTHER, 8)):
        panel.grid((14, y), 40, color, cells)
        panel.frame((34, y + 10), 10)
        panel.line((44, y + 15), target, _LEARNED, 1.6)
    panel.frame((97, 146), 14)
    panel.text((118, 153), "learned", 12, _LEARNED, ha="left")
    panel.line((104, 146), (104, 126), _LEARNED, 1.6, arrow=True)
    panel.out(_mix([_LAYERS[3], _LAYERS[1], _OTHER]))
    panel.frame((_OUT_AT[0] + _OUT / 2, _OUT_AT[1] + _OUT / 4), _OUT / 4)


def _text_gated(panel: _Panel) -> None:
    ends = panel.maps()
    target = panel.step("Σ", (112, 108))
    for group, width, y in ((ends[:2], 1.2, 141), (ends[2:], 4.5, 75)):
        for end in group:
            panel.line(end, (66, y))
        panel.line((66, y), target, _LEARNED, width)
    panel.text((104, 167), "question", 12, _LEARNED)
    panel.line((106, 158), (110, 126), _LEARNED, 1.6, arrow=True)
    panel.line(ends[3], (_OUT_AT[0] - 6, 66), arrow=True)
    panel.out(_LAYERS[3], _mix(_LAYERS, (1, 1, 4, 4)))


PANELS: Mapping[str, tuple[Callable[[_Panel], None], str, str]] = {
    "select": (_select, "one map", "N × C"),
    "average": (_average, "the mean", "N × C"),
    "scalar_mix": (_scalar_mix, "one weight per layer", "N × C"),
    "depth_attention": (_depth_attention, "weights for each patch", "N × C"),
    "concat": (_concat, "side by side on channels", "N × L·C"),
    "dense_connector": (_dense_connector, "query, means of runs", "N × 3C"),
    "token_concat": (_token_concat, "one after the other", "L·N × C"),
    "text_gated": (_text_gated, "gated by the question", "N × 2C"),
    "mmfuser": (_mmfuser, "query reads a few points", "N × C"),
    "cross_attention": (_cross_attention, "query reads all cells", "N × C"),
    "attention_pool": (_attention_pool, "a token per window", "N/4 × C"),
    "spatial_aggregator": (_spatial_aggregator, "queries read windows", "N × C"),
}
"""Name of a fuser -> how it is drawn, its operation, and tokens × channels that come out."""


def draw_fusers(file: str | Path) -> None:
    """Write the picture as PNG, opaque and in few colours."""
    rows = -(-len(PANELS) // _COLUMNS)
    height = _HEAD + rows * _PANEL + 6
    figure = Figure(figsize=(_WIDTH / 100, height / 100), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(height, 0))
    axes.axis("off")
    _legend(_Panel(axes, (0, 0)))
    for index, (name, (paint, operation, tokens)) in enumerate(PANELS.items()):
        edge = _WIDTH / _COLUMNS
        corner = (index % _COLUMNS * edge, _HEAD + index // _COLUMNS * _PANEL)
        box = FancyBboxPatch(
            (corner[0] + 7, corner[1] + 4), edge - 12, _PANEL - 8, boxstyle="round,pad=0,rounding_size=6"
        )
        box.set(facecolor="#f8fafc", edgecolor="#cbd5e1", lw=0.8, zorder=0)
        axes.add_patch(box)
        panel = _Panel(axes, corner)
        panel.text((16, 20), name, 15, ha="left", weight="bold")
        paint(panel)
        panel.text((16, 187), operation, 12.5, ha="left")
        panel.text((edge - 14, 187), tokens, 12.5, "#1d4ed8", ha="right", weight="bold")
    stored = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stored)
    picture = Image.open(stored).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(file, format="PNG", optimize=True)


def _legend(panel: _Panel) -> None:
    for index, color in enumerate(_LAYERS):
        panel.grid((16 + 34 * index, 16), 28, color)
    panel.text(
        (158, 30), "L maps of N tokens × C channels,\nshallow to deep; the deepest is the query", 12.5, ha="left"
    )
    for place in (1, 0):
        panel.grid((468 + 6 * place, 20 - 6 * place), 28, _LAYERS[3 - 2 * place])
    panel.text((512, 30), "plates behind: channels\nside by side", 12.5, ha="left")
    panel.line((690, 30), (722, 30), _LEARNED, 3)
    panel.text(
        (732, 30), "weights, places and queries that\nare learned or depend on the input", 12.5, _LEARNED, ha="left"
    )


if __name__ == "__main__":
    draw_fusers(sys.argv[1] if len(sys.argv) > 1 else "docs/fusers.png")
