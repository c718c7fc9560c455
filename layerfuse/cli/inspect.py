"""The command that says what a backbone is and what fusers cost on it; no weights are needed or made."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch

from layerfuse.backbones import Backbone, create_backbone
from layerfuse.errors import UserError
from layerfuse.fusers import FUSERS, create_fuser, list_fusers, source_layers
from layerfuse.layers import resolve_layers

from ._looking import image_size_of, spread_at_most

__all__ = ["main"]

_EVERY = "every"
# Layers that are tapped where neither user nor source says which.
_USUAL = 5
_USUAL_FUSER = "mmfuser"


def main(argv: Sequence[str]) -> None:
    """Print the facts of a backbone, and what fusers cost on it."""
    parser = argparse.ArgumentParser(
        prog="layerfuse inspect",
        description="Say what a backbone is and what fusers cost on it. Nothing is downloaded or allocated, but for "
        "the config of a model that stands on the hub.",
        epilog="example: layerfuse inspect timm:eva02_large_patch14_clip_336 --layers 3 8 13 18 23",
    )
    add = parser.add_argument
    add("model", help="family:name, as in `layerfuse models`; or transformers:FOLDER")
    add("--layers", nargs="+", type=int, help="tapped layers (default: those that the fuser's source taps, else five)")
    add("--fuser", help=f"name of a fuser, or {_EVERY!r} (default: {_USUAL_FUSER})")
    add("--image-size", nargs="+", type=int, metavar="PIXELS", help="edge, or height and width, if not its own")
    add("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    told = _facts(arguments.model, arguments.fuser, arguments.layers, image_size_of(arguments))
    print(json.dumps(told, indent=2) if arguments.json else _written(told))


def _facts(model: str, fuser: str | None, layers: Sequence[int] | None, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return everything that is told, as JSON has it."""
    if fuser not in (None, _EVERY):
        FUSERS.get(fuser)  # before the backbone, which may have to ask the hub
    names = list_fusers() if fuser == _EVERY else [fuser or _USUAL_FUSER]
    with torch.device("meta"):
        # Every layer, so that of each the width and the grid are known.
        backbone = create_backbone(model, layers=lambda depth: range(depth + 1), pretrained=False, image_size=size)
        layers = None if layers is None else resolve_layers(layers, backbone.num_blocks)
        costs = [_cost(name, backbone, layers, alone=fuser not in (None, _EVERY)) for name in names]
    return {
        "model": model,
        "depth": backbone.num_blocks,
        "width": backbone.embed_dim,
        "patch_size": list(backbone.patch_size),
        "image_size": list(backbone.image_size),
        "other_sizes": backbone.any_size,
        "channels": backbone.in_channels,
        "grid": list(backbone.grid(*backbone.image_size)),
        "stages": _stages(backbone),
        "prefix_tokens": backbone.num_prefix_tokens,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "preprocessing": backbone.preprocessing.to_dict(),
        "fusers": costs,
    }


def _stages(backbone: Backbone) -> list[dict[str, Any]]:
    """Return the runs of layers whose maps have one width, stride and grid."""
    found: list[dict[str, Any]] = []
    each = zip(backbone.layers, backbone.map_channels, backbone.strides, backbone.grids(), strict=True)
    for layer, width, stride, grid in each:
        told = {"width": width, "stride": list(stride), "grid": list(grid)}
        if found and found[-1].items() >= told.items():
            found[-1]["layers"][1] = layer
        else:
            found.append({"layers": [layer, layer], **told})
    return found


def _cost(name: str, backbone: Backbone, layers: Sequence[int] | None, *, alone: bool) -> dict[str, Any]:
    """Return what a fuser costs, or, where it is one of many, why it cannot be built on these layers."""
    try:
        wanted = layers or source_layers(FUSERS.get(name), backbone.num_blocks) or spread_at_most(_USUAL)
        resolved = resolve_layers(wanted, backbone.num_blocks)
        widths = [backbone.map_channels[layer] for layer in resolved]
        fuser = create_fuser(name, in_channels=widths, num_layers=len(resolved))
        cost = fuser.cost(tuple(backbone.grids()[layer] for layer in resolved))
    except UserError as error:
        if alone:
            raise
        return {"name": name, "why_not": str(error)}
    return {"name": name, "layers": list(resolved), **dataclasses.asdict(cost)}


def _written(told: dict[str, Any]) -> str:
    """Write the facts for people."""
    (height, width), stages = told["image_size"], told["stages"]
    one = len(stages) == 1
    facts = {
        "depth": f"{told['depth']} blocks: layers 0 (embeddings), 1 … {told['depth']}",
        "width": ", ".join(f"{stage['width']:,}" for stage in stages) + " channels",
        "images": f"{height}×{width} pixels, {told['channels']} channels; "
        + ("other sizes, too" if told["other_sizes"] else "no other size, unless it is built for it (--image-size)"),
        "patches": "{}×{} pixels".format(*told["patch_size"]),
        **{"grid" if one else "layers {} … {}".format(*stage["layers"]): _of_stage(stage, one) for stage in stages},
        "prefix tokens": str(told["prefix_tokens"]),
        "parameters": f"{told['parameters']:,}",
        "preprocessing": ", ".join(f"{key} {_short(value)}" for key, value in told["preprocessing"].items()),
    }
    head = [told["model"], *(f"  {key:<15}{value}" for key, value in facts.items()), ""]
    table = [("fuser", "layers", "parameters", "tokens", "channels", "GFLOPs an image")]
    for cost in told["fusers"]:
        if "why_not" in cost:
            continue
        layers = " ".join(map(str, cost["layers"]))
        numbers = (f"{cost[key]:,}" for key in ("parameters", "num_tokens", "out_channels"))
        table.append((cost["name"], layers, *numbers, f"{cost['flops'] / 1e9:,.2f}"))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    left_out = [f"{cost['name']}: {cost['why_not']}" for cost in told["fusers"] if "why_not" in cost]
    return "\n".join([*head, *(lines if len(lines) > 1 else ()), *left_out])


def _of_stage(stage: dict[str, Any], one: bool) -> str:
    """Write the maps of a stage; its width and stride only where there are several."""
    rows, columns = stage["grid"]
    grid = f"{rows}×{columns}, {rows * columns:,} patch tokens"
    return grid if one else "{}, {:,} channels, stride {}×{} pixels".format(grid, stage["width"], *stage["stride"])


def _short(value: Any) -> str:
    """Write a value of the preprocessing briefly."""
    if isinstance(value, list):
        return "(" + ", ".join(f"{entry:.4g}" if isinstance(entry, float) else str(entry) for entry in value) + ")"
    return str(value)
