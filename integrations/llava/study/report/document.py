"""The report: one HTML file that needs nothing beside it; and its part about maps alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from integrations.llava.evaluation import TASKS, ScoredAnswer
from integrations.llava.evaluation.metrics import parse_box

from ..results import DemoResults, Example, Figure, Probe
from ..statistics import AVERAGE, baseline, conclude, differences, estimate, explain_layer_zero
from .charts import Column, Interval, Series, interval_chart, line_chart, marker, smoothed, thinned

__all__ = ["render_maps", "render_report"]

_PAGE = Path(__file__).parent / "page"

# Kind of figure -> heading, and what it is.
_MAPS = {
    "readings": (
        "Which characters and shapes can still be read",
        "A linear probe names the character or the shape that a cell shows, from the token of that cell alone: blue "
        "where it is right, orange where it is wrong. What is blue behind a fuser and orange in the last layer that it "
        "taps, it has from an earlier one.",
    ),
    "layers": (
        "What layers and fusers see",
        "The first three principal components of each map as red, green and blue: cells of one colour have like "
        "tokens; colours of two maps cannot be compared. Below each map, the same over the scene.",
    ),
    "shares": (
        "What depth_attention takes of each layer",
        "The share of each layer in each cell, on one scale from dark to bright; the layers of a cell add up to one. "
        "Where text or objects stand out, the fuser has learned which layer knows them.",
    ),
    "points": (
        "Where mmfuser looks",
        (
            "A cross is a cell of the query, points of its colour are where it reads; large ones weigh more. Large "
            "points that gather at their cross or on one thing were learned; points all over the scene were not yet."
        ),
    ),
}


def render_report(results: DemoResults) -> str:
    """Draw the report as one HTML page: styles, charts and pictures are inside."""
    slots = {fuser: number for number, fuser in enumerate(results.fusers)}
    time_parts = list(dict.fromkeys(part for run in results.runs for part in run.seconds))
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            style=Markup((_PAGE / "report.css").read_text(encoding="utf-8")),
            markers={fuser: marker(0, 0, slot, fuser) for fuser, slot in slots.items()},
            kinds=[(TASKS.get(kind), scores.num_questions) for kind, scores in results.runs[0].kinds.items()],
            table=_table(results, slots),
            sentences=conclude(results),
            secondary=_secondary(results),
            baseline=baseline(results),
            difference_chart=_difference_chart(results, slots),
            examples=[_example(example, slots) for example in results.examples],
            probe_charts=[_probe(probe, slots, wide=number == 0) for number, probe in enumerate(results.probes)],
            probe_sentence=_probe_sentence(results.probes),
            layer_zero=explain_layer_zero(results),
            loss_charts=_loss_charts(results, slots),
            time_parts=time_parts,
            total_seconds=sum(sum(run.seconds.values()) for run in results.runs),
            costs=_costs(results, time_parts),
            map_groups=_map_groups(results.figures),
        )
    )


def render_maps(figures: Sequence[Figure]) -> str:
    """Draw the report's part about maps alone, a section of HTML that the report's style fits."""
    return _environment().get_template("maps.html.j2").render(map_groups=_map_groups(figures))


def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined)
    environment.filters["data_uri"] = _data_uri
    return environment


def _map_groups(figures: Sequence[Figure]) -> list[tuple[str, str, list[Figure]]]:
    """Heading, explanation and figures of each kind that there is."""
    groups = []
    for kind, (heading, text) in _MAPS.items():
        if shown := [figure for figure in figures if figure.kind == kind]:
            groups.append((heading, text, shown))
    return groups


def _table(results: DemoResults, slots: Mapping[str, int]) -> list[dict[str, Any]]:
    estimates = {fuser: list(map(estimate, results.accuracies(fuser))) for fuser in results.fusers}
    columns = [{cell.mean for cell in column} for column in zip(*estimates.values(), strict=True)]
    # Nothing is best where all are alike.
    best = [max(means) if len(means) > 1 else None for means in columns]
    return [
        {
            "fuser": fuser,
            "slot": slots[fuser] % 8,
            "cells": [
                {"mean": cell.mean, "spread": cell.spread, "chance": chance, "best": cell.mean == highest}
                for cell, chance, highest in zip(cells, results.chance_levels, best, strict=True)
            ],
        }
        for fuser, cells in estimates.items()
    ]


def _secondary(results: DemoResults) -> dict[str, Any] | None:
    kinds = results.runs[0].kinds.items()
    pairs = [(kind, name) for kind, scores in kinds for name in scores.scores if name != "accuracy"]
    if not pairs:
        return None
    rows = {
        fuser: [fmean(run.kinds[kind].scores[metric] for run in results.of(fuser)) for kind, metric in pairs]
        for fuser in results.fusers
    }
    names = [
        f"{TASKS.get(kind).title}: {metric.replace('_', ' ').replace('iou', 'mean IoU')}" for kind, metric in pairs
    ]
    return {"names": names, "rows": rows}


def _difference_chart(results: DemoResults, slots: Mapping[str, int]) -> Markup | None:
    intervals = [
        Interval(
            row="mean" if difference.kind == AVERAGE else TASKS.get(difference.kind).title,
            name=f"{difference.fuser}, {difference.kind}: {difference.points:+.1f} points",
            value=difference.points,
            error=2 * difference.error,
            slot=slots[difference.fuser],
        )
        for difference in differences(results)
    ]
    if not intervals:
        return None
    label = f"accuracy minus that of {baseline(results)} (percentage points)"
    return interval_chart(intervals, title=f"Difference from {baseline(results)} by kind of question", x_label=label)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _example(example: Example, slots: Mapping[str, int]) -> dict[str, Any]:
    by_question = list(zip(*(example.answers[fuser] for fuser in slots), strict=True))
    questions = [answers[0].question for answers in by_question]
    boxed = [answers for answers in by_question if answers[0].question.kind == "box"]
    return {
        "name": example.name,
        "image": example.image,
        "questions": [question.text for question in questions],
        "expected": [
            each.answer if isinstance(each.answer, str) else f"[{', '.join(f'{value:.2f}' for value in each.answer)}]"
            for each in questions
        ],
        "rows": {fuser: example.answers[fuser] for fuser in slots},
        "boxes": [box for answers in boxed for box in _boxes(answers, slots)],
    }


def _boxes(answers: Sequence[ScoredAnswer], slots: Mapping[str, int]) -> list[tuple[str, tuple[float, ...]]]:
    """List the right box and each fuser's, with their classes in the style sheet."""
    truth = answers[0].question.answer
    drawn = [("truth", truth if isinstance(truth, tuple) else parse_box(truth))]
    drawn += [(f"c{slot % 8}", parse_box(said.prediction)) for slot, said in zip(slots.values(), answers, strict=True)]
    return [(css, box) for css, box in drawn if box is not None]


def _probe(probe: Probe, slots: Mapping[str, int], *, wide: bool) -> dict[str, Any]:
    line = Series(probe.title, [(layer, 100 * value) for layer, value in probe.layers.items()], slot=7, mark_every=1)
    chart = line_chart(
        [line],
        title=f"Probe by layer: {probe.title}",
        x_label="layer",
        y_label="cells named correctly (%)",
        y_range=(0, 100),
        integer_x=True,
        level=("commonest class", 100 * probe.chance),
        columns=[Column(fuser, [(100 * value, slots[fuser])]) for fuser, value in probe.fusers.items()] if wide else (),
        width=960 if wide else 520,
    )
    return {"title": probe.title, "chart": chart, "num_cells": probe.num_cells, "wide": wide}


def _probe_sentence(probes: Sequence[Probe]) -> str:
    if not probes:
        return ""
    probe = probes[0]
    best = max(probe.layers, key=lambda layer: probe.layers[layer])
    last = max(probe.layers)
    share = f"{probe.title}: layer {best} reads {100 * probe.layers[best]:.0f} % of the cells"
    if best == last:
        return f"{share}, the most of all, and it is the last: at this size late layers have not lost it."
    return f"{share}, the last layer ({last}) {100 * probe.layers[last]:.0f} %."


def _loss_charts(results: DemoResults, slots: Mapping[str, int]) -> dict[str, Markup]:
    firsts = [results.of(fuser)[0] for fuser in results.fusers]
    charts = {}
    for stage in firsts[0].losses:
        if not all(run.losses.get(stage) for run in firsts):
            continue
        series = []
        for run in firsts:
            points = [(float(step), loss) for step, loss in run.losses[stage]]
            series.append(Series(run.fuser, thinned(points), slots[run.fuser], faint=True))
            strong = thinned(smoothed(points))
            series.append(Series(run.fuser, strong, slots[run.fuser], mark_every=max(1, len(strong) // 6)))
        # Later points of a curve matter; the first few would squeeze them into the bottom.
        series.sort(key=lambda entry: not entry.faint)
        charts[stage] = line_chart(
            series,
            title=f"Training loss, stage {stage}",
            x_label="step",
            y_label="cross-entropy (nats per token)",
            y_range=(0, max(y for entry in series for _, y in entry.points)),
        )
    return charts


def _costs(results: DemoResults, time_parts: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for fuser in results.fusers:
        runs = results.of(fuser)
        taken = [[run.seconds[part] for run in runs if part in run.seconds] for part in time_parts]
        seconds = [fmean(values) if values else None for values in taken]
        rows.append({"fuser": fuser, "layers": runs[0].layers, "seconds": seconds, **runs[0].cost})
    return rows
