"""The command line of runs: what is running, finished, stopped or failed, in a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from integrations.llava._text import aligned, printable
from integrations.llava.training import RunStatus, find_runs
from layerfuse.errors import UserError

from .options import CommandParser

__all__ = ["main"]

_HEAD = ["run", "state", "stage", "step", "loss", "evaluation", "age"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print how runs stand."""
    parser = CommandParser(
        prog="python -m integrations.llava runs",
        description="Say of each run in a folder, and in those below it, whether it is running, finished, stopped or "
        "failed, with its last loss and evaluation, and the time since its log last grew. Nothing is changed.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", default="runs", help="of runs, or of one (default: runs)")
    parser.add_argument("--json", action="store_true", help="a list of objects, for programs")
    arguments = parser.parse_args(argv)
    try:
        runs = find_runs(arguments.folder)
    except UserError as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps([_plain(asdict(run)) for run in runs], indent=2))
    elif not runs:
        print(f"no runs in {arguments.folder}")
    else:
        print("\n".join(aligned([_HEAD, *map(_cells, runs)], left=3)))
        for run in runs:
            if run.reason and run.state != "running":
                print(f"\n{run.folder} {run.state}: {printable(run.reason)}")
    return 0


def _cells(run: RunStatus) -> list[str]:
    name, value = next(iter(run.evaluation.items()), ("", 0.0))
    return [
        str(run.folder),
        run.state,
        run.stage,
        f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if not name else f"{value:.4f}" if name == "loss" else f"{name} {value:.4f}",
        _age(run.seconds),
    ]


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _plain(value: Any) -> Any:
    """A value as JSON has it, which knows neither paths nor numbers that are none (NaN): null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
