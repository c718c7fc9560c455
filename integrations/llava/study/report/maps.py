"""Pictures of what layers and fusers hold of test scenes: maps in colours, what a probe reads, shares, sampling points.

A scene has few cells. So some scenes are enlarged until a map has 32 cells along a side, and many are looked at side by
side in the size that was trained.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from integrations.llava.modeling import FusedLlavaForConditionalGeneration, blank_condition
from integrations.llava.synthetic import CELL, GRID, Scene, draw_scene
from layerfuse.analysis import colorize, png_bytes, point_sheet, rgb_map
from layerfuse.backbones import Backbone
from layerfuse.features import FeatureMaps
from layerfuse.fusers import DepthAttention, MMFuser

from ..probes import NOTHING, Models, Readings, cell_labels
from ..results import Figure, Panel

__all__ = ["draw_layers", "draw_points", "draw_readings", "draw_shares"]

# Red, green, blue of cells that a probe names wrongly and rightly.
_WRONG, _RIGHT = (232, 100, 0), (30, 120, 235)


@torch.inference_mode()
def draw_layers(models: Models, enlarged: Backbone, scenes: Sequence[Scene]) -> Iterator[Figure]:
    """Draw all layers and the fusers' outputs in colours, a figure a scene; each map also over the scene.

    Args:
        models: fuser -> trained model with a frozen backbone.
        enlarged: that backbone with all layers tapped, for larger pictures.
        scenes: the first test images.
    """
    for number, scene in enumerate(scenes):
        own = draw_scene(scene)
        height, width = enlarged.image_size
        picture = own.resize((width, height), Image.Resampling.BICUBIC)
        features = enlarged(enlarged.preprocessing.batch([picture]))
        maps = {f"layer {layer}": tokens for layer, tokens in zip(features.layers, features.maps, strict=True)}
        maps |= {f"output of {name}": _fused(model, features) for name, model in models.items()}
        under = _png(own.convert("L"))
        panels = [Panel("the scene", _png(own))]
        for title, tokens in maps.items():
            colours = (rgb_map(tokens, features.grids[0])[0].numpy() * 255).round().astype(np.uint8)
            panels.append(Panel(title, png_bytes(colours), under=under))
        rows, columns = features.grids[0]
        yield Figure("layers", f"Test image {number}, enlarged to {rows}×{columns} cells.", panels)


def draw_readings(readings: Readings) -> Figure:
    """Draw which cells of test scenes a linear probe names rightly, by layer and by fuser, many scenes side by side."""
    side = _side(readings.scenes)
    panels = [Panel("the scenes", png_bytes(_scenes(readings.scenes)))]
    # Faded, so that the colours stand out; characters and shapes can still be seen.
    grey = 0.5 * _scenes(readings.scenes).mean(-1, keepdims=True).repeat(3, axis=-1) + 110
    for title, right in readings.right.items():
        cells = _tiled(right[: side**2], side).numpy().repeat(CELL, axis=0).repeat(CELL, axis=1)
        picture = grey.copy()
        for value, colour in ((0, _WRONG), (1, _RIGHT)):
            picture[cells == value] = 0.45 * picture[cells == value] + 0.55 * np.array(colour)
        share = (cells == 1).sum() / (cells != NOTHING).sum()
        # A palette: photographs with sensor noise would take thrice the room.
        drawn = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).quantize(48, dither=Image.Dither.NONE)
        panels.append(Panel(f"{title}: {share:.0%} right", _png(drawn)))
    return Figure("readings", f"{side**2} test images side by side, {side * GRID}×{side * GRID} cells.", panels)


@torch.inference_mode()
def draw_shares(models: Models, scenes: Sequence[Scene]) -> Iterator[Figure]:
    """Draw how much each cell takes of each layer, for each model whose fuser is ``depth_attention``."""
    scenes = scenes[: _side(scenes) ** 2]
    characters, _, colors = cell_labels(scenes)
    places = {"text": characters.labels != NOTHING, "objects": colors.labels != NOTHING}
    places["elsewhere"] = ~(places["text"] | places["objects"])
    for name, model in models.items():
        fuser = model.model.fuser
        if not isinstance(fuser, DepthAttention):
            continue
        weights = fuser.layer_weights(_features(model, scenes)).mean(1).transpose(0, 1)
        layers = model.model.vision_tower.backbone.layers
        tiled = [_tiled(cells, _side(scenes)) for cells in weights]
        panels = [Panel("the scenes", png_bytes(_scenes(scenes)))]
        for layer, cells, colours in zip(layers, weights, colorize(tiled, size=len(tiled[0])), strict=True):
            means = ", ".join(f"{place} {cells.flatten(1)[where].mean():.0%}" for place, where in places.items())
            panels.append(Panel(f"layer {layer}: {means}", png_bytes(colours)))
        yield Figure("shares", f"{name}: how much each cell takes of each layer, mean over heads.", panels)


@torch.inference_mode()
def draw_points(models: Models, scene: Scene) -> Iterator[Figure]:
    """Draw where cells of text, objects and background read each layer, for each model whose fuser is ``mmfuser``."""
    picture = np.asarray(draw_scene(scene))
    cells = [(scene.text.row, scene.text.column), *((item.row, item.column) for item in scene.objects[:3])]
    for name, model in models.items():
        fuser = model.model.fuser
        if not isinstance(fuser, MMFuser):
            continue
        features = _features(model, [scene])
        locations, weights = fuser.sampling_points(features)
        titles = [f"layer {layer}" for at, layer in enumerate(features.layers) if at != fuser.query_index]
        grid = features.grids[fuser.query_index]
        sheet = point_sheet(picture, locations[0], weights[0], grid=grid, cells=cells, titles=titles)
        note = f"{name}: where {len(cells)} cells of the query read the other layers."
        yield Figure("points", note, [Panel("", sheet)])


def _features(model: FusedLlavaForConditionalGeneration, scenes: Sequence[Scene]) -> FeatureMaps:
    tower = model.model.vision_tower
    return tower(tower.backbone.preprocessing.batch([draw_scene(scene) for scene in scenes]))


def _fused(model: FusedLlavaForConditionalGeneration, features: FeatureMaps) -> torch.Tensor:
    """Output of a model's fuser, (1, N, C), for the maps of all layers of one picture."""
    fuser = model.model.fuser
    own = features.take(model.model.vision_tower.backbone.layers)
    return fuser(own, blank_condition(fuser, 1, own.maps[0]))


def _side(scenes: Sequence[Scene]) -> int:
    """Scenes along a side, where as many as there are make a square, at most 4 × 4."""
    return min(4, math.isqrt(len(scenes)))


def _tiled(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Lay the maps (side², H, W) of scenes out side by side: (side · H, side · W)."""
    return rearrange(maps, "(rows columns) h w -> (rows h) (columns w)", rows=side)


def _scenes(scenes: Sequence[Scene]) -> np.ndarray:
    """Draw scenes side by side, as many as make a square: (height, width, 3) uint8."""
    side = _side(scenes)
    pictures = np.stack([np.asarray(draw_scene(scene)) for scene in scenes[: side**2]])
    return rearrange(pictures, "(rows columns) h w c -> (rows h) (columns w) c", rows=side)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
