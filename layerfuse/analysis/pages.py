"""Figures as PNG, and the page that shows them: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from layerfuse.analysis.contributions import LayerContributions
from layerfuse.analysis.cross_validation import LayerScores
from layerfuse.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["contribution_plot", "heat_map", "html_page", "new_figure", "png_of_figure", "score_plot"]

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "img{max-width:100%;height:auto}td,th{padding:.1em .8em;text-align:right}.warning{background:#fd8;padding:.6em}"
)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of matplotlib, without its global state; ``width`` and ``height`` are in inches.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "figures are drawn with matplotlib, which is not installed; install the extra: pip install 'layerfuse[viz]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def png_of_figure(figure: Figure, *, dpi: int = 90) -> bytes:
    """Return a figure of matplotlib as PNG, with ``dpi`` pixels an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def heat_map(
    matrices: Mapping[str, torch.Tensor],
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    labels: tuple[str, str] = ("layer", "layer"),
) -> bytes:
    """Draw matrices beside each other as PNG, with their numbers where there is room for them.

    Args:
        matrices: title -> (R, C') numbers, in colours from the lowest, at most 0, to 1.
        rows: names of the R rows.
        columns: names of the C' columns.
        labels: of the vertical and the horizontal axis.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    cell = 0.42 if len(columns) <= 16 else 0.24
    figure = new_figure((1.7 + cell * len(columns)) * len(matrices), max(2.3, 1.1 + cell * len(rows)))
    for axes, (title, matrix) in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items(), strict=True
    ):
        low = min(0.0, float(matrix.min()))
        image = axes.imshow(matrix.numpy(), vmin=low, vmax=1, cmap="viridis")
        figure.colorbar(image, ax=axes, fraction=0.046)
        axes.set_title(title)
        axes.set_xticks(range(len(columns)), [str(name) for name in columns])
        axes.set_yticks(range(len(rows)), [str(name) for name in rows])
        axes.set_ylabel(labels[0])
        axes.set_xlabel(labels[1])
        if len(columns) > 16:
            continue
        for i, line in enumerate(matrix.tolist()):
            for j, value in enumerate(line):
                ink = "black" if value - low > 0.65 * (1 - low) else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    return png_of_figure(figure)


def score_plot(scores: LayerScores, *, chosen: Sequence[int] = ()) -> bytes:
    """Draw the share of right labels by layer as PNG: 95% intervals, chance, shuffled labels, chosen layers filled.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    figure = new_figure(max(4.5, 1.5 + 0.35 * len(scores.layers)), 3.2)
    axes = figure.subplots()
    for layer, right, (low, high) in zip(scores.layers, scores.accuracy, scores.intervals, strict=True):
        axes.plot((layer, layer), (low, high), color="tab:blue", linewidth=1)
        axes.plot(layer, right, "o", color="tab:blue", markerfacecolor="tab:blue" if layer in chosen else "white")
    axes.plot(scores.layers, scores.accuracy, color="tab:blue", linewidth=0.8, zorder=0)
    axes.axhline(scores.chance, color="grey", linestyle=":", label="commonest class")
    axes.axhline(
        float(scores.shuffled.quantile(0.95)), color="tab:orange", linestyle="--", label="shuffled labels, 95% below"
    )
    axes.set_xticks(scores.layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("right")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    # Above the axes: inside it would lie over points, wherever they are.
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    return png_of_figure(figure)


def contribution_plot(found: LayerContributions, titles: Sequence[str]) -> bytes:
    """Draw what each layer contributes as PNG: how far the fused tokens move without it, and the fuser's own weights.

    ``titles`` name the L layers.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    figure = new_figure(max(4.5, 1.6 + 0.7 * len(titles)), 3.2)
    axes = figure.subplots()
    kinds = {"moved without the layer": found.moved}
    if found.own_shares is not None:
        kinds["the fuser's own weights"] = found.own_shares
    width = 0.8 / len(kinds)
    for number, (label, shares) in enumerate(kinds.items()):
        middles = [place + (number - (len(kinds) - 1) / 2) * width for place in range(len(titles))]
        axes.bar(middles, shares.tolist(), width=width, label=label)
    short = [title.removeprefix("layer ").replace("backbone ", "").replace(", layer ", ": ") for title in titles]
    axes.set_xticks(range(len(titles)), short)
    axes.set_xlabel("layer" if short == [title.removeprefix("layer ") for title in titles] else "backbone: layer")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    # Above the axes: inside it would lie over points, wherever they are.
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    return png_of_figure(figure)


def html_page(title: str, parts: Sequence[str | tuple[str, bytes]], *, warning: str = "") -> str:
    """Return an HTML page.

    Args:
        title: stands at its head.
        parts: in order, a paragraph of text, its lines kept, or a picture as (what it shows, PNG).
        warning: stands before all parts, if any.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    if warning:
        body.append(f'<p class="warning">{html.escape(warning)}</p>')
    for part in parts:
        if isinstance(part, str):
            body.append(f"<p>{html.escape(part)}</p>".replace("\n", "<br>\n"))
        else:
            text, picture = html.escape(part[0], quote=True), base64.b64encode(part[1]).decode()
            body.append(f'<p>{text}<br>\n<img alt="{text}" src="data:image/png;base64,{picture}"></p>')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return "\n".join(["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>", ""])
