"""The command that draws the maps of layers over pictures, and what a fuser makes of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from layerfuse.analysis import map_sheet, point_sheet, reduce_map, rgb_map
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import Fuser
from layerfuse.fusers.depth_attention import DepthAttention
from layerfuse.fusers.mmfuser import MMFuser

from ._encoders import about_model, add_encoder_arguments, layer_titles, one_by_one, pictures_as_seen, tapped_model
from ._looking import add_looking_arguments, prepare_output, write_results
from ._reading import Pictures, picture_files

__all__ = ["main"]

_COLOURS = "colours"


def main(argv: Sequence[str]) -> None:
    """Write a sheet of maps for each picture."""
    parser = argparse.ArgumentParser(
        prog="layerfuse maps",
        description="Draw the maps of layers beside and over each picture, and those that a fuser makes of them; of a "
        "trained encoder also where its deformable attention reads, or how much each patch takes of each layer.",
        epilog="example: layerfuse maps timm:vit_base_patch14_dinov2.lvd142m photo.jpg --layers 3 6 9 12",
    )
    add_encoder_arguments(parser)
    parser.add_argument(
        "--reduction", choices=(_COLOURS, "norm", "component"), default=_COLOURS, help="(default: colours)"
    )
    add_looking_arguments(parser, "maps")
    arguments = parser.parse_args(argv)
    prepare_output(arguments)
    pictures = Pictures(picture_files(arguments.images), arguments)
    backbone, fuser = tapped_model(arguments)
    about = about_model(arguments, backbone, fuser)
    if arguments.reduction == _COLOURS:
        about.append("Colours: first three principal components of a map; like tokens have like colours in one map.")
    parts: list[str | tuple[str, bytes]] = ["\n".join(about)]
    drawn: dict[str, bytes] = {}
    count = 0
    for names, images, features in pictures.batches(backbone):
        for name, seen, own in zip(names, pictures_as_seen(images, backbone), one_by_one(features), strict=True):
            stem = f"{count:03d}-{Path(name).stem}"
            for kind, text, sheet in _sheets(seen, own, fuser, arguments.reduction):
                drawn[f"{stem}-{kind}.png"] = sheet
                parts.append((f"{name}: {text}", sheet))
            count += 1
    numbers = {
        "layers": list(backbone.layers),
        "sources": [source for source, _ in backbone.taps],
        "grids": [list(grid) for grid in backbone.grids()],
        "fuser": None if fuser is None else fuser.name,
    }
    write_results(arguments, f"Maps of {arguments.model}", parts, numbers, drawn, left_out=pictures.left_out)


def _sheets(
    pictures: Sequence[np.ndarray], features: FeatureMaps, fuser: Fuser | None, reduction: str
) -> Iterator[tuple[str, str, bytes]]:
    """Give the sheets of a picture, as each backbone sees it: kind, what it shows, PNG."""
    titles = layer_titles(features)
    seen = [pictures[source] for source in features.sources or (0,) * len(features)]
    maps = {
        title: _reduced(tokens, grid, reduction)
        for title, tokens, grid in zip(titles, features.maps, features.grids, strict=True)
    }
    if fuser is None:
        yield "maps", "maps of layers, and the same over the picture", map_sheet(seen, maps)
        return
    grid = fuser.out_grid(features.grids)
    beneath = list(seen)
    if grid is not None:
        front = fuser.extra_tokens(features.grids).front
        with torch.no_grad():
            fused = fuser(features)[:, front : front + grid[0] * grid[1]]
        maps["fused"] = _reduced(fused, grid, reduction)
        beneath.append(seen[features.grids.index(grid) if grid in features.grids else 0])
    yield "maps", "what goes into the fuser and what comes out, and the same over the picture", map_sheet(beneath, maps)
    if isinstance(fuser, MMFuser):
        yield "points", "where five cells read each layer", _points(seen, features, fuser, titles)
    if isinstance(fuser, DepthAttention):
        weights = fuser.layer_weights(features)[0].mean(0)
        sheet = map_sheet(seen, dict(zip(titles, weights, strict=True)), common_scale=True)
        yield "depth", "how much each patch takes of each layer, mean over heads", sheet


def _points(seen: Sequence[np.ndarray], features: FeatureMaps, fuser: MMFuser, titles: Sequence[str]) -> bytes:
    locations, weights = fuser.sampling_points(features)
    rows, columns = grid = features.grids[fuser.query_index]
    cells = [(rows // 2, columns // 2)]
    cells += [(rows * i // 4, columns * j // 4) for i in (1, 3) for j in (1, 3)]
    own = [position for position in range(len(features)) if position != fuser.query_index]
    return point_sheet(
        [seen[position] for position in own],
        locations[0],
        weights[0],
        grid=grid,
        cells=cells,
        titles=[titles[position] for position in own],
    )


def _reduced(tokens: torch.Tensor, grid: Grid, reduction: str) -> torch.Tensor:
    """Return the map (H, W) or (H, W, 3) of one picture."""
    return rgb_map(tokens, grid)[0] if reduction == _COLOURS else reduce_map(tokens, grid, reduction=reduction)[0]
