"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from integrations.llava.evaluation import TASKS, ScoredAnswer
from integrations.llava.evaluation.metrics import parse_box

from ..results import DemoResults, Example, Probe
from ..statistics import AVERAGE, baseline, conclude, differences, estimate
from .charts import Column, Interval, Series, interval_chart, line_chart, marker

__all__ = ["render_report"]

_PAGE = Path(__file__).parent / "page"


def render_report(results: DemoResults) -> str:
    """Draw the report as one HTML page: styles, charts and pictures are inside."""
    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters["data_uri"] = _data_uri
    slots = {fuser: number for number, fuser in enumerate(results.fusers)}
    page = environment.get_template("report.html.j2").render(
        style=Markup((_PAGE / "report.css").read_text(encoding="utf-8")),
        fusers=results.fusers,
        seeds=results.seeds,
        facts=results.facts,
        origin=results.origin,
        seconds=results.seconds,
        markers={fuser: marker(0, 0, slot, fuser) for fuser, slot in slots.items()},
        num_questions=sum(scores.num_questions for scores in results.runs[0].kinds.values()),
        kinds=_kinds(results),
        table=_table(results, slots),
        chance=_chance(results),
        sentences=conclude(results),
        secondary=_secondary(results),
        baseline=baseline(results),
        others=[fuser for fuser in results.fusers if fuser != baseline(results)],
        difference_chart=_difference_chart(results, slots),
        examples=[_example(example, slots) for example in results.examples],
        photo=results.photo,
        probe_charts=[_probe(probe, slots, wide=number == 0) for number, probe in enumerate(results.probes)],
        probe_sentence=_probe_sentence(results.probes),
        taps={fuser: results.of(fuser)[0].layers for fuser in results.fusers},
        figures=results.figures,
        loss_charts=_loss_charts(results, slots),
        time_parts=_time_parts(results),
        total_seconds=sum(sum(run.seconds.values()) for run in results.runs),
        costs=_costs(results),
        folders=[run.folder for run in results.runs],
    )
    return page


def _kinds(results: DemoResults) -> list[dict[str, Any]]:
    scores = results.runs[0].kinds
    return [
        {"title": TASKS.get(kind).title, "source": TASKS.get(kind).source, "num_questions": scores[kind].num_questions}
        for kind in results.kinds
    ]


def _table(results: DemoResults, slots: Mapping[str, int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for fuser in results.fusers:
        columns = [[run.kinds[kind].accuracy for run in results.of(fuser)] for kind in results.kinds]
        columns.append([run.average for run in results.of(fuser)])
        cells = [
            {"mean": own.mean, "spread": own.spread, "chance": chance, "best": False}
            for own, chance in zip(map(estimate, columns), _chance(results), strict=True)
        ]
        rows.append({"fuser": fuser, "slot": slots[fuser] % 8, "cells": cells})
    for index in range(len(results.kinds) + 1):
        highest = max(row["cells"][index]["mean"] for row in rows)
        for row in rows:
            # Nothing is best where all are alike.
            alike = all(other["cells"][index]["mean"] == highest for other in rows)
            row["cells"][index]["best"] = row["cells"][index]["mean"] == highest and not alike
    return rows


def _chance(results: DemoResults) -> list[float]:
    levels = [results.chance[kind] for kind in results.kinds]
    return [*levels, sum(levels) / len(levels)]


def _secondary(results: DemoResults) -> dict[str, Any] | None:
    scores = results.runs[0].kinds
    pairs = [(kind, name) for kind in results.kinds for name in scores[kind].scores if name != "accuracy"]
    if not pairs:
        return None
    rows = []
    for fuser in results.fusers:
        runs = results.of(fuser)
        means = [sum(run.kinds[kind].scores[metric] for run in runs) / len(runs) for kind, metric in pairs]
        rows.append({"fuser": fuser, "values_": means})
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
    columns = [example.answers[fuser] for fuser in slots]
    by_question = list(zip(*columns, strict=True))
    overlay = [_boxes(answers, slots) for answers in by_question if answers[0].question.kind == "box"]
    questions = [answers[0].question for answers in by_question]
    return {
        "name": example.name,
        "image": example.image,
        "questions": [question.text for question in questions],
        "expected": [_expected(question.answer) for question in questions],
        "rows": [
            {"fuser": fuser, "answers": [{"text": answer.prediction, "right": answer.right} for answer in own]}
            for fuser, own in zip(slots, columns, strict=True)
        ],
        "overlay": Markup("").join(overlay),
    }


def _expected(answer: str | tuple[float, ...]) -> str:
    return answer if isinstance(answer, str) else f"[{', '.join(f'{value:.2f}' for value in answer)}]"


def _boxes(answers: Sequence[ScoredAnswer], slots: Mapping[str, int]) -> Markup:
    truth = answers[0].question.answer
    drawn = [("truth", truth if isinstance(truth, tuple) else parse_box(truth))]
    drawn += [
        (f"c{slot % 8}", parse_box(answer.prediction)) for slot, answer in zip(slots.values(), answers, strict=True)
    ]
    rectangles = [
        Markup('<rect class="{}" x="{:.3f}" y="{:.3f}" width="{:.3f}" height="{:.3f}"/>').format(
            css, box[0], box[1], box[2] - box[0], box[3] - box[1]
        )
        for css, box in drawn
        if box is not None
    ]
    return Markup("").join(rectangles)


def _probe(probe: Probe, slots: Mapping[str, int], *, wide: bool) -> dict[str, Any]:
    line = Series(probe.title, [(layer, 100 * value) for layer, value in probe.layers.items()], slot=7, markers=True)
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
    stages = [stage for stage in firsts[0].losses if all(run.losses.get(stage) for run in firsts)]
    charts = {}
    for stage in stages:
        series = []
        for run in firsts:
            points = [(float(step), loss) for step, loss in run.losses[stage]]
            series.append(Series(run.fuser, _thinned(points), slots[run.fuser], faint=True))
            series.append(Series(run.fuser, _thinned(_smoothed(points)), slots[run.fuser]))
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


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average over a window of a twentieth of the curve, centred."""
    half = max(1, len(points) // 40)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def _thinned(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """Keep at most about `most` points, the last among them."""
    stride = max(1, -(-len(points) // most))
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _time_parts(results: DemoResults) -> list[str]:
    return list(dict.fromkeys(part for run in results.runs for part in run.seconds))


def _costs(results: DemoResults) -> list[dict[str, Any]]:
    rows = []
    for fuser in results.fusers:
        runs = results.of(fuser)
        seconds = []
        for part in _time_parts(results):
            taken = [run.seconds[part] for run in runs if part in run.seconds]
            seconds.append(sum(taken) / len(taken) if taken else None)
        layers = ", ".join(map(str, runs[0].layers))
        rows.append({"fuser": fuser, "layers": layers, "seconds": seconds, **runs[0].cost})
    return rows
