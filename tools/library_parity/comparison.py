"""Feature maps and prefix tokens of the same images and weights in two libraries, compared layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import torch

from layerfuse.backbones import BACKBONES, Backbone
from layerfuse.features import FeatureMaps
from layerfuse.testing import random_images
from tools.library_parity.builders import open_clip_model

__all__ = ["Agreement", "compare_backbones", "compare_features", "resized"]


@dataclass(frozen=True)
class Agreement:
    """How far two libraries agree.

    Attributes:
        libraries: the two.
        absolute: for each layer, the largest difference of a number in its map or prefix tokens.
        relative: the same, divided by the largest absolute value in that layer.
    """

    libraries: tuple[str, str]
    absolute: tuple[float, ...]
    relative: tuple[float, ...]


def compare_backbones(
    backbones: Mapping[str, Backbone], size: tuple[int, int], *, num_images: int = 2
) -> list[Agreement]:
    """Compare every pair of backbones, on random images of a size in pixels."""
    images = random_images(num_images, size=size)
    with torch.no_grad():
        features = {library: backbone(images) for library, backbone in backbones.items()}
    return [
        Agreement((one, other), *compare_features(features[one], features[other]))
        for one, other in combinations(features, 2)
    ]


def compare_features(one: FeatureMaps, other: FeatureMaps) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return for each layer the largest absolute difference, and that as a share of the layer's largest value."""
    assert one.layers == other.layers and one.grids == other.grids
    absolute, relative = [], []
    for first, second in zip(_tokens(one), _tokens(other), strict=True):
        assert first.shape == second.shape
        absolute.append(float((first - second).abs().max()))
        relative.append(absolute[-1] / float(first.abs().max()))
    return tuple(absolute), tuple(relative)


def resized(backbones: Mapping[str, Backbone], size: tuple[int, int]) -> dict[str, Backbone]:
    """Build backbones with the same weights for another (height, width), resampled as each library does it."""
    return {library: _resized(library, backbone, size) for library, backbone in backbones.items()}


def _resized(library: str, backbone: Backbone, size: tuple[int, int]) -> Backbone:
    family: Any = BACKBONES.get(library)
    model: Any = backbone.model
    if library != "open_clip" or hasattr(model, "trunk"):
        resampled: Backbone = family(model, layers=backbone.layers, image_size=size)
        return resampled.eval()
    # open_clip resamples when weights are loaded.
    from open_clip.model import resize_pos_embed

    width, first = model.transformer.width, model.transformer.resblocks[0]
    empty = open_clip_model(
        quick_gelu=type(first.mlp.gelu).__name__ == "QuickGELU",
        width=width,
        head_width=width // first.attn.num_heads,
        patch_size=model.patch_size[0],
        image_size=size,
    )
    resampled = family(empty(), layers=backbone.layers)
    state = {f"visual.{key}": weight for key, weight in model.state_dict().items()}
    resize_pos_embed(state, SimpleNamespace(visual=resampled.model))
    resampled.model.load_state_dict({key.removeprefix("visual."): weight for key, weight in state.items()})
    return resampled.eval()


def _tokens(features: FeatureMaps) -> list[torch.Tensor]:
    if not features.prefix:
        return list(features.maps)
    return [torch.cat(pair, dim=1) for pair in zip(features.prefix, features.maps, strict=True)]
