"""The command line that all benchmarks share."""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.goals import judge, render
from benchmarks.session import RESULTS, Session, say

__all__ = ["TOPICS", "execute", "main"]

TOPICS = {
    "cpu": ("op", "train", "encoder", "scaling"),
    "cuda": ("op", "train", "generation", "encoder", "op_choice"),
}
"""The topics of each command, in the order in which they run; each is a module with `run(session)`."""


def main(*topics: str, goals_of: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run topics, print the verdicts, and leave."""
    sys.exit(execute(*topics, goals_of=goals_of, arguments=arguments))


def execute(*topics: str, goals_of: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Run topics, all of a device if none is named, and return the exit code.

    Args:
        topics: modules of this package.
        goals_of: "cpu" or "cuda"; None: what ``--device`` says.
        arguments: instead of the program's own.
    """
    options = _parse(topics, goals_of, arguments)
    goals_of = goals_of or options.device
    device = "cpu" if options.dry_run else goals_of
    if device == "cuda" and not torch.cuda.is_available():
        say("no CUDA device is to be seen; --dry-run runs everything at tiny size on the CPU.")
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    begin = time.monotonic()
    session = Session(
        device=device,
        scale="dry" if options.dry_run else "quick" if options.quick else "full",
        goals_of=goals_of,
        seed=options.seed,
        note=options.note,
        path=options.output or (None if options.dry_run or options.quick else RESULTS / f"{goals_of}.jsonl"),
        deadline=begin + 60 * options.minutes if options.minutes else None,
    )
    say(f"{session.common['hardware']}, {session.common['threads']} threads, {session.common['versions']}")
    for topic in options.only or topics or TOPICS[goals_of]:
        session.topic = topic
        say(f"{topic} ({time.monotonic() - begin:.0f} s)")
        with session.attempt(topic, "all"):
            importlib.import_module(f"benchmarks.{topic}").run(session)
    verdicts = judge(session.rows, goals_of, clock=options.clock)
    if options.only or topics:
        verdicts = [verdict for verdict in verdicts if verdict.rows or verdict.outcome == "FAIL"]
    failed = [row for row in session.rows if row.get("status") == "failed"]
    if options.dry_run:
        say("\nThis was a dry run: the numbers mean nothing.")
    say(f"\n{render(verdicts)}\n\n{len(session.rows)} rows, {len(failed)} failed, {time.monotonic() - begin:.0f} s")
    for row in failed:
        say(f"  failed: {row['benchmark']} · {row['candidate']} · {row['error']}")
    if options.json:
        _write_json(options.json, session, verdicts)
    broken = any(verdict.outcome == "FAIL" for verdict in verdicts) or bool(failed)
    return int(options.strict and broken)


def _parse(topics: Sequence[str], goals_of: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    if not topics:
        parser.add_argument("--only", choices=TOPICS[goals_of or "cpu"], action="append", help="repeat for several")
    else:
        parser.set_defaults(only=None)
    if goals_of is None:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose rows and goals")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes: below a minute on two cores")
    parser.add_argument("--dry-run", action="store_true", help="everything once, tiny, on the CPU")
    parser.add_argument("--json", type=Path, help="write rows and verdicts of this run here, too")
    parser.add_argument("--output", type=Path, help="file that rows are added to; default: benchmarks/results")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a goal or a row failed")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="which times judge the goals")
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0 if goals_of == "cuda" else 12.0,
        help="begin no long part that would end after so many; default: 12, on a GPU 9",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="goes into every row, such as: machine shared")
    return parser.parse_args(arguments)


def _write_json(path: Path, session: Session, verdicts: Sequence[object]) -> None:
    judged = [
        {
            "goal": verdict.goal.name,
            "peers": verdict.goal.peers,
            "bound": f"{verdict.goal.comparison} {verdict.goal.bound}",
            "quantity": verdict.goal.quantity,
            "worst": verdict.worst,
            "of": verdict.of,
            "rows": verdict.rows,
            "outcome": verdict.outcome,
        }
        for verdict in verdicts  # type: ignore[attr-defined]
    ]
    path.write_text(json.dumps({**session.common, "goals": judged, "rows": session.rows}, indent=1) + "\n", "utf-8")
