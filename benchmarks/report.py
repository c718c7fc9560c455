"""Brings rows of full runs into docs/performance.md, as tables and pictures: `python -m benchmarks.report`.

Of rows that were measured more than once, the last counts. It reads files only; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import judge
from benchmarks.session import RESULTS, say

__all__ = ["draw_op", "draw_scaling", "fill_in", "read_rows", "table"]

_AXES = {"tokens": "tokens of a map", "levels": "maps", "batch": "images"}
_TITLES = {
    "scaling": "Seconds of every fuser over the tokens of a map, the number of maps and that of images",
    "op_cpu": "Seconds of deformable attention over the queries of a batch, on the CPU",
    "op_gpu": "Seconds of deformable attention over the queries of a batch, on a GPU",
}
_PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read rows of several files, those of full runs only; the last of each kind."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.get("scale") == "full":
                key = (path.name, row["benchmark"], row["candidate"], row.get("case"), row.get("stage"))
                latest[key] = row
    return list(latest.values())


def draw_scaling(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw each fuser's seconds over tokens, levels and batch, both axes logarithmic."""
    found = [row for row in rows if str(row["benchmark"]).startswith("exponent in ")]
    if not found:
        return []
    figure, panels = _figure(len(_AXES))
    for panel, (axis, label) in zip(panels, _AXES.items(), strict=True):
        own = sorted((row for row in found if row["axis"] == axis), key=lambda row: row["fuser"])
        for marker, row in zip(_MARKERS, own, strict=False):
            panel.loglog(row["sizes"], row["seconds"], marker=marker, label=f"{row['fuser']} ({row['value']:.2f})")
        panel.set_xlabel(label)
        if own:
            panel.set_xticks(own[0]["sizes"], labels=[f"{size:,}" for size in own[0]["sizes"]])
            panel.minorticks_off()
            # Below, where it covers no line.
            panel.legend(
                fontsize=6,
                title="fuser (exponent)",
                title_fontsize=6,
                ncols=3,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.2),
            )
    panels[0].set_ylabel("seconds")
    return [_save(figure, folder / "scaling.svg")]


# One for each fuser: there are more of them than colours.
_MARKERS = "osD^v<>pPX*hH8d"


def draw_op(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw the seconds of deformable attention over the queries of a batch, both axes logarithmic."""
    names = ("op forward", "op forward+backward")
    found = [row for row in rows if row["benchmark"] in names and "median_seconds" in row and "grid" in row]
    if not found:
        return []
    figure, panels = _figure(len(names))
    for panel, name in zip(panels, names, strict=True):
        for label in sorted({row["candidate"] for row in found}):
            points = sorted(
                (row["batch_size"] * row["grid"][0] * row["grid"][1], row["median_seconds"])
                for row in found
                if row["benchmark"] == name and row["candidate"] == label
            )
            if points:
                panel.loglog(*zip(*points, strict=True), marker="o", linestyle="", label=label)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("queries of the batch")
        if panel.lines:
            panel.legend(fontsize=7)
    panels[0].set_ylabel("seconds")
    hardware = {row.get("hardware", "") for row in found}
    figure.suptitle(", ".join(sorted(hardware)), fontsize=8)
    return [_save(figure, folder / f"op_{'cpu' if any('core' in name for name in hardware) else 'gpu'}.svg")]


def _figure(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "layerfuse"})  # small, and the same each time
    from matplotlib import pyplot

    return pyplot.subplots(1, count, figsize=(4.2 * count, 4.2), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path


def table(rows: Sequence[Mapping[str, Any]], device: str) -> str:
    """Write the verdict on each goal of a device as a table in Markdown, below it what it was measured on."""
    lines = ["| goal | against | worst | goal is | | worst case |", "|---|---|---|---|---|---|"]
    for verdict in judge(rows, device):
        goal, unit = verdict.goal, "×" if verdict.goal.quantity == "speedup" else ""
        worst = "–" if verdict.worst is None else f"{verdict.worst:.3g}{unit}"
        bound = f"{'≥' if goal.comparison == '>=' else '≤'} {goal.bound}{unit}"
        cells = (goal.name, " or ".join(goal.peers) or "–", worst, bound, verdict.outcome, verdict.of)
        lines.append(f"| {' | '.join(cells)} |")
    where = sorted({f"{row['hardware']}, torch {row['versions']['torch']}, commit {row['commit']}" for row in rows})
    return "\n".join([*lines, "", "Measured on " + "; ".join(where) + "."])


def fill_in(page: str, name: str, text: str) -> str:
    """Return a page with other text between its marks `<!-- name -->` and `<!-- /name -->`."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert marks.search(page), name
    return marks.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def main() -> None:
    """Bring the rows of benchmarks/results into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=_PAGE, help="pictures go into a folder of its name beside it")
    options = parser.parse_args()
    page, folder = options.page.read_text(encoding="utf-8"), options.page.with_suffix("")
    for device in ("cpu", "cuda"):
        path = RESULTS / f"{device}.jsonl"
        if rows := read_rows([path] if path.exists() else []):
            pictures = [*draw_op(rows, folder), *draw_scaling(rows, folder)]
            shown = [f"![{_TITLES[picture.stem]}]({folder.name}/{picture.name})" for picture in pictures]
            page = fill_in(page, device, "\n\n".join([table(rows, device), *shown]))
    options.page.write_text(page, encoding="utf-8")
    say(str(options.page))


if __name__ == "__main__":
    main()
