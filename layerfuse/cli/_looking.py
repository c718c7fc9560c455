"""What the commands that look at pictures share: their arguments, the backbone, and what is written."""

from __future__ import annotations

import argparse
import errno
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from layerfuse.analysis import html_page, new_figure
from layerfuse.backbones import Backbone, create_backbone
from layerfuse.errors import ExistingFileError, InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.files import write_text
from layerfuse.layers import spread

from ._reading import add_reading_arguments, say

__all__: list[str] = []

RANDOM = "WEIGHTS ARE RANDOM (--pretrained false): what is shown says nothing about the model of this name."


def layer_choice(text: str) -> int | float:
    """Read a layer as `create_backbone` takes it: a number, or with a point a share of the depth."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no layer; give numbers (-2 = last but one), or shares such as 0.5"
        ) from None


def spread_at_most(count: int) -> Callable[[int], Sequence[int]]:
    """Return a choice of ``count`` layers, spread over the depth, or of fewer where there are not as many blocks."""

    def choose(depth: int) -> Sequence[int]:
        return spread(min(count, depth - 1))(depth) if depth > 1 else (depth,)

    return choose


def add_looking_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the arguments that all of these commands take; ``output`` is the folder where none is named."""
    add = parser.add_argument
    add("--output", default=output, help=f"folder for PNG, JSON and one HTML page (default: {output})")
    add("--image-size", nargs="+", type=int, metavar="PIXELS", help="edge, or height and width, if not its own")
    add_reading_arguments(parser)
    add("--device", help="such as cuda:1; the first GPU if there is one, else the CPU")
    add("--pretrained", choices=("true", "false"), default="true", help="false: random weights, to try things out")


def prepare_output(arguments: argparse.Namespace) -> None:
    """Make the output folder, so that what cannot be drawn or written is told before the work.

    Raises:
        FileExistsError: if a file has its name.
        ValueError: if nothing can be written there.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    new_figure(1, 1)
    folder = Path(arguments.output)
    if folder.exists() and not folder.is_dir():
        raise ExistingFileError(
            errno.EEXIST, f"--output {folder} is a file; give a folder, or a name that is not taken"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output {folder} takes no files ({error.strerror}); give another folder.") from error


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
    """Return where the model goes.

    Raises:
        ValueError: if it is a GPU that torch does not find.
    """
    named = re.fullmatch(r"cuda(?::(\d+))?", arguments.device or "")
    if named and int(named[1] or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"--device {arguments.device}: torch finds {count} GPUs of CUDA here; name one, or 'cpu'.")
    return arguments.device or ("cuda" if torch.cuda.is_available() else None)


def finest(grids: Sequence[Grid]) -> Grid:
    """Return the grid with the most cells."""
    return max(grids, key=math.prod)


def on_finest_grid(features: FeatureMaps) -> FeatureMaps:
    """Return the maps on the finest of their grids, where each cell has the token that covers its middle."""
    return features.resample(finest(features.grids), "nearest")


def some_tokens(features: FeatureMaps, count: int) -> tuple[FeatureMaps, torch.Tensor]:
    """Return at most ``count`` tokens of each picture, the same cells in every layer, and which cells these are."""
    total = features.maps[0].shape[1]
    # Seeded: two backbones must give the same cells. Regular steps would fall on the same columns in every row.
    cells = torch.randperm(total, generator=torch.Generator().manual_seed(total))[:count].sort().values
    return take_cells(features, cells.expand(features.batch_size, -1)), cells


def take_cells(features: FeatureMaps, cells: torch.Tensor) -> FeatureMaps:
    """Return the tokens of some cells (B, K) of maps of one grid; prefix tokens are left out."""
    index = cells.unsqueeze(-1)
    maps = tuple(tokens.gather(1, index.expand(-1, -1, tokens.shape[-1])) for tokens in features.maps)
    return replace(features, maps=maps, prefix=(), grids=((1, cells.shape[1]),) * len(maps))


def write_results(
    arguments: argparse.Namespace,
    title: str,
    parts: Sequence[str | tuple[str, bytes]],
    numbers: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    *,
    left_out: Mapping[str, str],
) -> None:
    """Write pictures, numbers as JSON and the page into the output folder, and say where.

    ``left_out`` says why, of each picture that could not be read.
    """
    folder = Path(arguments.output)
    warning = "" if arguments.pretrained == "true" else RANDOM
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    told = {"title": title, "pretrained": arguments.pretrained == "true", **numbers}
    if left_out:
        told["left_out"] = dict(left_out)
        parts = [*parts, f"Left out, since they cannot be read: {', '.join(left_out)}."]
    write_text(folder / "numbers.json", json.dumps(told, indent=1) + "\n")
    write_text(folder / "index.html", html_page(title, parts, warning=warning))
    print(f"{folder / 'index.html'}, numbers.json, {', '.join(pictures)}")
