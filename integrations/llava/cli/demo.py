"""The command line of the demo."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from integrations.llava.study import DemoResults, DemoSettings, conclude, estimate, run_demo
from integrations.llava.training import RunInterrupted
from layerfuse.errors import UserError

from .options import CommandParser, quiet_bars

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, print its table, and say where the report is."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    if given["feature_cache"] is True:
        given["feature_cache"] = given["output"] / "features"
    settings = DemoSettings(**{**given, "fusers": tuple(given["fusers"]), "seeds": tuple(given["seeds"])})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_bars()
    command = shlex.join(["python", "-m", "integrations.llava", "demo", *arguments])
    try:
        results, report = run_demo(settings, command=command)
    except UserError as error:
        parser.error(str(error))
    except RunInterrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished part", file=sys.stderr)
        return 130
    print(f"\n{table(results)}\n")
    print("\n".join(conclude(results)))
    if results.photo is not None:
        print(f"\n{results.photo.prompt}")
        print("\n".join(f"  {name}: {answer or '(nothing)'}" for name, answer in results.photo.answers.items()))
    print(f"\nreport: {report}")
    return 0


def table(results: DemoResults) -> str:
    """Write the table fuser × kind as text: per cent of right answers, ± standard deviation over seeds."""
    rows = [
        ["fuser", *results.kinds, "mean"],
        ["questions", *(str(scores.num_questions) for scores in results.runs[0].kinds.values())],
    ]
    for fuser in results.fusers:
        rows.append([fuser, *(_cell(values) for values in results.accuracies(fuser))])
    rows.append(["without looking", *(f"{100 * level:.1f}" for level in results.chance_levels)])
    width = 14 if len(results.seeds) > 1 else 10
    name = max(len(row[0]) for row in rows) + 2
    return "\n".join(first.ljust(name) + "".join(cell.rjust(width) for cell in cells) for first, *cells in rows)


def _cell(values: Sequence[float]) -> str:
    value = estimate(values)
    return f"{100 * value.mean:.1f}" + ("" if value.spread is None else f" ±{100 * value.spread:.1f}")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m integrations.llava demo",
        description="Make data, train a small LLaVA in both stages with each fuser, compare them, write report.html. "
        "Parts that were finished with the same settings are used again.",
        allow_abbrev=False,
    )
    given = DemoSettings()
    fusers, seeds = " ".join(given.fusers), " ".join(map(str, given.seeds))

    def number(flag: str, what: str, default: int | None = None) -> None:
        note = "the recipe's" if default is None else default
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{what} (default: {note})")

    add = parser.add_argument
    add("--fusers", nargs="+", default=given.fusers, metavar="NAME", help=f"fusers to compare (default: {fusers})")
    add("--seeds", nargs="+", type=int, default=given.seeds, metavar="N", help=f"of the runs (default: {seeds})")
    add("--output", type=Path, default=given.output, metavar="FOLDER", help=f"of everything (default: {given.output})")
    add("--image", type=Path, metavar="FILE", help="a photograph of yours; needs --prompt")
    add("--prompt", metavar="TEXT", help="a question about the photograph")
    add("--recipe", default=given.recipe, help=f"name or file of what all runs share (default: {given.recipe})")
    add(
        "--feature-cache",
        nargs="?",
        type=Path,
        const=True,
        metavar="FOLDER",
        help="encode an image once for all runs, and keep its feature maps on disk (default: off; the folder features "
        "in the output)",
    )
    add(
        "--redraw", action="store_true", help="draw the report of a finished study anew, with today's code; no training"
    )
    number("--pretrain-steps", "optimizer steps of the first stage")
    number("--finetune-steps", "optimizer steps of the second stage")
    number("--batch-size", "samples a step in both stages")
    number("--num-train", "training images", given.num_train)
    number("--num-test", "test images, with a question of each kind", given.num_test)
    number("--data-seed", "seed of images and questions", given.data_seed)
    number("--num-examples", "test images shown in the report", given.num_examples)
    number("--num-probe-images", "training images that the probes learn on", given.num_probe_images)
    return parser
