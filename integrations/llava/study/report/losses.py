"""Loss curves of several runs beside each other, a panel per stage: as a page, or as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from integrations.llava._files import json_lines
from integrations.llava.config import STAGES
from layerfuse.errors import InputError
from layerfuse.files import atomic_file

from .charts import Series, line_chart, marker, smoothed, thinned

__all__ = ["RunLosses", "draw_losses", "read_losses", "render_losses"]

_PAGE = Path(__file__).parent / "page"
_LABEL = "cross-entropy (nats per token)"

# Colours and marks of the page, for the picture.
_COLORS = ("#0b66a8", "#c9520a", "#0a7f5c", "#a8468c", "#8a6a00", "#3d4fc4", "#7a4b2a", "#4b5560")
_MARKS = ("o", "s", "^", "D", "P", "*", "v", "X")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class RunLosses:
    """Losses of a run: stage -> (step, loss) of its steps, and of its evaluations."""

    name: str
    steps: Mapping[str, Points]
    evaluations: Mapping[str, Points]


def read_losses(folder: str | Path) -> RunLosses:
    """Read the losses of a run, which is called as its folder is given.

    Raises:
        ValueError: if it has logged none, or its log is damaged.
    """
    file = Path(folder) / "metrics.jsonl"
    rows = [row for _, row in json_lines(file, growing=True)] if file.is_file() else []
    found: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}, "eval_loss": {}}
    for row in rows:
        for key, own in found.items():
            if math.isfinite(row.get(key, math.nan)):
                own.setdefault(row["stage"], []).append((float(row["step"]), row[key]))
    if not found["loss"]:
        raise InputError(f"{folder} has logged no step (metrics.jsonl); give the folder of a run that has made some.")
    return RunLosses(str(folder), found["loss"], found["eval_loss"])


def render_losses(runs: Sequence[RunLosses]) -> str:
    """Draw the curves as one HTML page that needs nothing beside it."""
    environment = Environment(loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined)
    charts = {}
    for stage in _stages(runs):
        low, high = _range(runs, stage)
        series = []
        for slot, run in _having(runs, stage):
            cut = [(step, min(loss, high)) for step, loss in run.steps[stage]]
            series.append(Series(run.name, thinned(cut), slot, faint=True))
            series.append(Series(run.name, thinned(smoothed(run.steps[stage])), slot))
            if held_out := run.evaluations.get(stage):
                series.append(Series(f"{run.name}, evaluation", held_out, slot, faint=True, mark_every=1))
        series.sort(key=lambda entry: not entry.faint)
        title = f"Losses, stage {stage}"
        charts[stage] = line_chart(series, title=title, x_label="step", y_label=_LABEL, y_range=(low, high), width=960)
    return environment.get_template("losses.html.j2").render(
        runs=runs,
        charts=charts,
        markers={run.name: marker(0, 0, slot, run.name) for slot, run in enumerate(runs)},
        style=Markup((_PAGE / "report.css").read_text(encoding="utf-8")),
    )


def draw_losses(runs: Sequence[RunLosses], file: str | Path) -> None:
    """Draw the curves as a PNG.

    Raises:
        OSError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = _stages(runs)
    figure = Figure(figsize=(9, 4.2 * len(stages)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, stage in zip(figure.subplots(len(stages), squeeze=False)[:, 0], stages, strict=True):
        for slot, run in _having(runs, stage):
            color = _COLORS[slot % len(_COLORS)]
            axes.plot(*zip(*run.steps[stage], strict=True), color=color, linewidth=0.8, alpha=0.28)
            axes.plot(*zip(*smoothed(run.steps[stage]), strict=True), color=color, linewidth=2, label=run.name)
            if held_out := run.evaluations.get(stage):
                mark = _MARKS[slot % len(_MARKS)]
                axes.plot(*zip(*held_out, strict=True), mark, color=color, label=f"{run.name}, evaluation")
        low, high = _range(runs, stage)
        axes.set(title=stage, xlabel="step", ylabel=_LABEL, ylim=(low, high))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    with atomic_file(Path(file)) as opened:
        figure.savefig(opened, format="png", dpi=150)


def _stages(runs: Sequence[RunLosses]) -> list[str]:
    known = {stage for run in runs for stage in run.steps}
    return [*(stage for stage in STAGES if stage in known), *sorted(known - {*STAGES})]


def _having(runs: Sequence[RunLosses], stage: str) -> Iterator[tuple[int, RunLosses]]:
    """Runs that made steps of a stage, with the number of their colour, which is the same in all panels."""
    return ((slot, run) for slot, run in enumerate(runs) if stage in run.steps)


def _range(runs: Sequence[RunLosses], stage: str) -> tuple[float, float]:
    """Lowest and highest loss that a panel shows: single steps high above the others do not squeeze it."""
    steps = [loss for _, run in _having(runs, stage) for _, loss in run.steps[stage]]
    calm = [loss for _, run in _having(runs, stage) for _, loss in smoothed(run.steps[stage])]
    calm += [loss for run in runs for _, loss in run.evaluations.get(stage, ())]
    margin = 0.05 * (max(calm) - min(steps)) or 0.1
    return min(*steps, *calm) - margin, max(calm) + margin
