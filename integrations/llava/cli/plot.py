"""The command line of loss curves: several runs in one picture, or on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from integrations.llava.study.report import draw_losses, read_losses, render_losses
from integrations.llava.training import find_runs
from layerfuse.errors import FileAccessError, InputError, UserError
from layerfuse.files import write_text

from .options import CommandParser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the losses of runs."""
    parser = CommandParser(
        prog="python -m integrations.llava plot",
        description="Draw the losses of runs beside each other, a panel per stage: each step's, faint; smoothed; and a "
        "mark for each evaluation.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; a folder above them takes all of them")
    parser.add_argument("--output", default="losses.png", help="a .png or .html file (default: losses.png)")
    arguments = parser.parse_args(argv)
    try:
        _draw(arguments.runs, Path(arguments.output))
    except UserError as error:
        parser.error(str(error))
    print(f"losses: {arguments.output}")
    return 0


def _draw(given: Sequence[str], output: Path) -> None:
    if output.suffix not in (".png", ".html"):
        raise InputError(f"--output {output} is neither a picture nor a page; give a name that ends in .png or .html.")
    folders: dict[Path, None] = {}
    for name in given:
        # A folder of an older version, or one that was copied without its notes, has its log at least.
        found = [Path(name)] if (Path(name) / "metrics.jsonl").is_file() else [run.folder for run in find_runs(name)]
        if not found:
            raise InputError(f"there is no run in {name}; give the folder of a run, or one with runs below it.")
        folders |= dict.fromkeys(found)
    runs = [read_losses(folder) for folder in folders]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".png":
            draw_losses(runs, output)
        else:
            write_text(output, render_losses(runs))
    except OSError as error:
        raise FileAccessError(
            error.errno, f"{output} cannot be written ({error.strerror}); give another --output"
        ) from error
