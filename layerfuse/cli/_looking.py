"""What the commands that look at pictures share: their arguments, how maps are made, progress, and what is written."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from layerfuse.analysis import html_page, new_figure
from layerfuse.backbones import Backbone, create_backbone
from layerfuse.errors import ExistingFileError, InputError, MissingFileError
from layerfuse.features import FeatureMaps
from layerfuse.files import write_text
from layerfuse.pictures import picture_names, read_picture

__all__: list[str] = []

RANDOM = "WEIGHTS ARE RANDOM (--pretrained false): what is shown says nothing about the model of this name."
# Seconds between two lines of progress where nobody watches.
_PATIENCE = 10.0


def layer_choice(text: str) -> int | float:
    """Read a layer as `create_backbone` takes it: a number, or with a point a share of the depth."""
    return float(text) if "." in text else int(text)


def say(text: str, end: str = "\n") -> None:
    """Tell whoever watches the command."""
    print(text, end=end, file=sys.stderr, flush=True)


class Progress:
    """One line that is written over on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._started = self._shown = time.monotonic()
        self._before: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        terminal, last = sys.stderr.isatty(), done == total
        if self._before is None:
            self._before = done
        if not (terminal or last or now - self._shown >= _PATIENCE):
            return
        self._shown = now
        speed = (done - self._before) / (now - self._started)
        left = f", {(total - done) / speed:,.0f} s left" if speed and not last else ""
        say(f"{chr(13) * terminal}{done:,} of {total:,} pictures{left}   ", end="\n" if last or not terminal else "")


def add_looking_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the arguments that all of these commands take; ``output`` is the folder where none is named."""
    add = parser.add_argument
    add("--output", default=output, help=f"folder for PNG, JSON and one HTML page (default: {output})")
    add("--image-size", nargs="+", type=int, metavar="PIXELS", help="edge, or height and width, if not its own")
    add("--batch-size", type=int, default=8, help="pictures that the model sees at a time (default: 8)")
    add("--device", help="such as cuda:1; the first GPU if there is one, else the CPU")
    add("--pretrained", choices=("true", "false"), default="true", help="false: random weights, to try things out")


def picture_files(given: Sequence[str]) -> dict[str, Path]:
    """Return the pictures that files and folders name: shown name -> file.

    Raises:
        FileNotFoundError: if one is neither a file nor a folder.
        ValueError: if a folder holds no picture.
    """
    files: dict[str, Path] = {}
    for text in given:
        place = Path(text)
        if place.is_dir():
            files.update({str(place / name): place / name for name in picture_names(place)})
        elif place.is_file():
            files[text] = place
        else:
            raise MissingFileError(
                f"{text} is neither a picture nor a folder; give files of pictures, or their folder."
            )
    return files


def prepare_output(arguments: argparse.Namespace) -> None:
    """Make the output folder, so that what cannot be drawn or written is told before the work.

    Raises:
        FileExistsError: if a file has its name.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    new_figure(1, 1)
    folder = Path(arguments.output)
    if folder.exists() and not folder.is_dir():
        raise ExistingFileError(
            errno.EEXIST, f"--output {folder} is a file; give a folder, or a name that is not taken"
        )
    folder.mkdir(parents=True, exist_ok=True)


def image_size_of(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Return the size of ``--image-size``, (height, width)."""
    size = arguments.image_size
    if size is not None and len(size) > 2:
        raise InputError(f"--image-size names {len(size)} numbers; give one edge, or height and width.")
    return None if size is None else (size[0], size[-1])


def backbone_with_layers(
    model: str, arguments: argparse.Namespace, layers: object = None, *, random: str = RANDOM
) -> Backbone:
    """Build a backbone that taps ``layers``, all of them if None, as the arguments say.

    Random weights are the same ones in each call, and ``random`` warns of them.
    """
    pretrained = arguments.pretrained == "true"
    if not pretrained:
        torch.manual_seed(0)
        say(random)
    choice: Any = layers if layers is not None else lambda depth: range(depth + 1)
    backbone = create_backbone(
        model,
        layers=choice,
        pretrained=pretrained,
        image_size=image_size_of(arguments),
        device=device_of(arguments),
    )
    return backbone.freeze()


def device_of(arguments: argparse.Namespace) -> str | None:
    """Return where the model goes."""
    return arguments.device or ("cuda" if torch.cuda.is_available() else None)


def batches_of(
    files: dict[str, Path], backbone: Backbone, batch_size: int
) -> Iterator[tuple[torch.Tensor, FeatureMaps]]:
    """Give batch after batch what the backbone sees and its feature maps, in float32 on the CPU; progress is shown."""
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; give at least 1.")
    paths, report = list(files.values()), Progress()
    report(0, len(paths))
    for start in range(0, len(paths), batch_size):
        pictures = [read_picture(path) for path in paths[start : start + batch_size]]
        with torch.inference_mode():
            images = backbone.prepare(pictures)
            features = backbone(images)
        yield images.to("cpu", torch.float32), features.to("cpu", torch.float32)
        report(start + len(pictures), len(paths))


def gather_maps(
    files: dict[str, Path], backbone: Backbone, batch_size: int, keep: Callable[[FeatureMaps], FeatureMaps]
) -> FeatureMaps:
    """Return what is kept of the maps of all pictures, as one batch."""
    return FeatureMaps.cat([keep(features) for _, features in batches_of(files, backbone, batch_size)])


def some_tokens(features: FeatureMaps, count: int) -> tuple[FeatureMaps, torch.Tensor]:
    """Return at most ``count`` tokens of each picture, the same cells in every layer, and which cells these are."""
    total = features.maps[0].shape[1]
    count = min(count, total)
    # Seeded: two backbones must give the same cells. Regular steps would fall on the same columns in every row.
    cells = torch.randperm(total, generator=torch.Generator().manual_seed(total))[:count].sort().values
    maps = tuple(tokens[:, cells] for tokens in features.maps)
    return replace(features, maps=maps, prefix=(), grids=((1, count),) * len(maps)), cells


def write_results(
    arguments: argparse.Namespace,
    title: str,
    parts: Sequence[str | tuple[str, bytes]],
    numbers: dict[str, Any],
    pictures: dict[str, bytes],
) -> None:
    """Write pictures, numbers as JSON and the page into the output folder, and say where."""
    folder = Path(arguments.output)
    warning = "" if arguments.pretrained == "true" else RANDOM
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    told = {"title": title, "pretrained": arguments.pretrained == "true", **numbers}
    write_text(folder / "numbers.json", json.dumps(told, indent=1) + "\n")
    write_text(folder / "index.html", html_page(title, parts, warning=warning))
    print(f"{folder / 'index.html'}, numbers.json, {', '.join(pictures)}")
