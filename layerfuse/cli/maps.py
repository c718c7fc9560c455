"""The command that draws the maps of layers over pictures, and what a fuser makes of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerfuse.analysis import map_sheet, point_sheet, reduce_map, rgb_map
from layerfuse.backbones import Backbone
from layerfuse.encoder import FusedEncoder
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import Fuser, create_fuser
from layerfuse.fusers.depth_attention import DepthAttention
from layerfuse.fusers.mmfuser import MMFuser

from ._looking import (
    add_looking_arguments,
    backbone_with_layers,
    device_of,
    layer_choice,
    prepare_output,
    spread_at_most,
    write_results,
)
from ._reading import Pictures, picture_files

__all__ = ["main"]

_COLOURS = "colours"
_USUAL = 6


def main(argv: Sequence[str]) -> None:
    """Write a sheet of maps for each picture."""
    parser = argparse.ArgumentParser(
        prog="layerfuse maps",
        description="Draw the maps of layers beside and over each picture, and those that a fuser makes of them; of a "
        "trained encoder also where its deformable attention reads, or how much each patch takes of each layer.",
        epilog="example: layerfuse maps timm:vit_base_patch14_dinov2.lvd142m photo.jpg --layers 3 6 9 12",
    )
    add = parser.add_argument
    add("model", help="family:name, transformers:FOLDER, or the folder of a trained encoder (save_pretrained)")
    add("images", nargs="+", help="pictures, and folders of them")
    add("--layers", nargs="+", type=layer_choice, help=f"numbers, or shares such as 0.5 (default: {_USUAL}, spread)")
    add("--fuser", help="name of a fuser, which is new: it shows its start, nothing that was learned")
    add("--reduction", choices=(_COLOURS, "norm", "component"), default=_COLOURS, help="(default: colours)")
    add_looking_arguments(parser, "maps")
    arguments = parser.parse_args(argv)
    prepare_output(arguments)
    pictures = Pictures(picture_files(arguments.images), arguments)
    backbone, fuser = _model(arguments)
    parts: list[str | tuple[str, bytes]] = [_about(arguments, backbone, fuser)]
    drawn: dict[str, bytes] = {}
    count = 0
    for names, images, features in pictures.batches(backbone):
        for name, (picture, own) in zip(names, _one_by_one(images, features, backbone), strict=True):
            stem = f"{count:03d}-{Path(name).stem}"
            for kind, text, sheet in _sheets(picture, own, fuser, arguments.reduction):
                drawn[f"{stem}-{kind}.png"] = sheet
                parts.append((f"{name}: {text}", sheet))
            count += 1
    fused = None if fuser is None else fuser.name
    numbers = {"layers": list(backbone.layers), "grids": [list(grid) for grid in backbone.grids()], "fuser": fused}
    write_results(arguments, f"Maps of {arguments.model}", parts, numbers, drawn, left_out=pictures.left_out)


def _model(arguments: argparse.Namespace) -> tuple[Backbone, Fuser | None]:
    """Return the backbone with its taps, and the fuser behind it if there is one."""
    if not _is_encoder(arguments.model):
        backbone = backbone_with_layers(arguments.model, arguments, arguments.layers or spread_at_most(_USUAL))
        if arguments.fuser is None:
            return backbone, None
        fuser = create_fuser(arguments.fuser, in_channels=backbone.embed_dim, num_layers=len(backbone.layers))
        return backbone, fuser.eval().requires_grad_(False)
    given = [name for name in ("layers", "fuser", "image_size") if getattr(arguments, name) is not None]
    if given or arguments.pretrained == "false":
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "--pretrained false"
        raise InputError(f"{arguments.model} is a trained encoder with layers, fuser and size; leave {shown} out.")
    encoder = FusedEncoder.from_pretrained(arguments.model, device=device_of(arguments)).requires_grad_(False)
    backbone_inside: Any = encoder.backbone
    if not isinstance(backbone_inside, Backbone):
        raise InputError(f"{arguments.model} has several backbones; maps are drawn of encoders with one.")
    return backbone_inside, encoder.fuser.to("cpu", torch.float32)


def _is_encoder(model: str) -> bool:
    """Say whether a model is the folder of an encoder."""
    config = Path(model) / "config.json"
    return config.is_file() and {"backbone", "fuser"} <= json.loads(config.read_text(encoding="utf-8")).keys()


def _about(arguments: argparse.Namespace, backbone: Backbone, fuser: Fuser | None) -> str:
    height, width = backbone.grids()[0]
    lines = [f"Layers {', '.join(map(str, backbone.layers))} on a grid of {height}×{width}."]
    if arguments.reduction == _COLOURS:
        lines.append("Colours: first three principal components of a map; like tokens have like colours in one map.")
    if arguments.fuser is not None:
        lines.append(f"The fuser {arguments.fuser} is new: what it makes of the maps was not learned.")
    elif fuser is not None:
        lines.append(f"The fuser is {fuser.name}, as it was trained.")
    return "\n".join(lines)


def _one_by_one(
    images: torch.Tensor, features: FeatureMaps, backbone: Backbone
) -> Iterator[tuple[np.ndarray, FeatureMaps]]:
    """Give each picture as the backbone sees it, (height, width, 3) uint8, with its maps, B = 1."""
    mean, std = (
        torch.tensor(each).view(-1, 1, 1) for each in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    for index, image in enumerate(images):
        pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        if pixels.shape[-1] != 3:
            pixels = pixels[..., :1].expand(-1, -1, 3)
        yield pixels.numpy(), features.map(lambda tokens, at=index: tokens[at : at + 1])  # type: ignore[misc]


def _sheets(
    picture: np.ndarray, features: FeatureMaps, fuser: Fuser | None, reduction: str
) -> Iterator[tuple[str, str, bytes]]:
    """Give the sheets of a picture: kind, what it shows, PNG."""
    titles = [f"layer {layer}" for layer in features.layers]
    maps = {
        title: _reduced(tokens, grid, reduction)
        for title, tokens, grid in zip(titles, features.maps, features.grids, strict=True)
    }
    if fuser is None:
        yield "maps", "maps of layers, and the same over the picture", map_sheet(picture, maps)
        return
    grid = fuser.out_grid(features.grids)
    if grid is not None:
        front = fuser.extra_tokens(features.grids).front
        with torch.no_grad():
            fused = fuser(features)[:, front : front + grid[0] * grid[1]]
        maps["fused"] = _reduced(fused, grid, reduction)
    yield "maps", "what goes into the fuser and what comes out, and the same over the picture", map_sheet(picture, maps)
    if isinstance(fuser, MMFuser):
        yield "points", "where five cells read each layer", _points(picture, features, fuser, titles)
    if isinstance(fuser, DepthAttention):
        weights = fuser.layer_weights(features)[0].mean(0)
        sheet = map_sheet(picture, dict(zip(titles, weights, strict=True)), common_scale=True)
        yield "depth", "how much each patch takes of each layer, mean over heads", sheet


def _points(picture: np.ndarray, features: FeatureMaps, fuser: MMFuser, titles: Sequence[str]) -> bytes:
    locations, weights = fuser.sampling_points(features)
    rows, columns = grid = features.grids[fuser.query_index]
    cells = [(rows // 2, columns // 2)]
    cells += [(rows * i // 4, columns * j // 4) for i in (1, 3) for j in (1, 3)]
    named = [title for position, title in enumerate(titles) if position != fuser.query_index]
    return point_sheet(picture, locations[0], weights[0], grid=grid, cells=cells, titles=named)


def _reduced(tokens: torch.Tensor, grid: Grid, reduction: str) -> torch.Tensor:
    """Return the map (H, W) or (H, W, 3) of one picture."""
    return rgb_map(tokens, grid)[0] if reduction == _COLOURS else reduce_map(tokens, grid, reduction=reduction)[0]
