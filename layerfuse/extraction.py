"""Feature maps of a few pictures in one call."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import nn

from layerfuse.backbones import create_backbone
from layerfuse.features import FeatureMaps
from layerfuse.layers import LayerChoice
from layerfuse.preprocessing import Images, PatchBatch

__all__ = ["extract_features"]


@overload
def extract_features(
    model: object,
    images: Images,
    *,
    layers: LayerChoice,
    pretrained: bool = ...,
    image_size: int | tuple[int, int] | None = ...,
    options: Mapping[str, Any] | None = ...,
) -> FeatureMaps: ...


@overload
def extract_features(
    model: object,
    images: PatchBatch | Mapping[str, Any],
    *,
    layers: LayerChoice,
    pretrained: bool = ...,
    image_size: int | tuple[int, int] | None = ...,
    options: Mapping[str, Any] | None = ...,
) -> list[FeatureMaps]: ...


def extract_features(
    model: object,
    images: Images | PatchBatch | Mapping[str, Any],
    *,
    layers: LayerChoice,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> FeatureMaps | list[FeatureMaps]:
    """Run a model on pictures and return the maps of L layers, each (B, N, C), in the order asked, without gradients.

    A model that is handed over stays as it is: a copy of its structure that shares its weights is tapped. To go through
    a data set, make the backbone once with `create_backbone`, whose arguments these are, and call it batch by batch.

    ``images`` are pictures, as `Preprocessing.batch` takes them; or a floating tensor (B, C, height, width) that is
    prepared already; or patches with their grids, of which the result is a list, see `Backbone.forward`.

    Raises:
        ValueError: if the name, a layer, an option or an image is not possible.
        TypeError: if ``model`` is neither a name nor a model nor a config, or an image is none.
    """
    if isinstance(model, nn.Module):
        shared = {id(weight): weight for weight in itertools.chain(model.parameters(), model.buffers())}
        model = copy.deepcopy(model, shared)
    backbone = create_backbone(model, layers=layers, pretrained=pretrained, image_size=image_size, options=options)
    batch: torch.Tensor | PatchBatch
    if isinstance(images, Mapping):
        batch = PatchBatch.from_mapping(images)
    elif isinstance(images, PatchBatch) or (isinstance(images, torch.Tensor) and images.is_floating_point()):
        batch = images
    else:
        batch = backbone.prepare(images)
    with torch.no_grad():
        features: FeatureMaps | list[FeatureMaps] = backbone(batch.to(backbone.device))
    return features
