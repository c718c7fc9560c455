"""Feature maps of a few pictures in one call."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from layerfuse.backbones import create_backbone
from layerfuse.features import FeatureMaps
from layerfuse.layers import LayerChoice
from layerfuse.preprocessing import Images

__all__ = ["extract_features"]


def extract_features(
    model: object,
    images: Images,
    *,
    layers: LayerChoice,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> FeatureMaps:
    """Run a model on pictures and return the maps of L layers, each (B, N, C), in the order asked, without gradients.

    A model that is handed over stays as it is: a copy of its structure that shares its weights is tapped. To go through
    a data set, make the backbone once with `create_backbone`, whose arguments these are, and call it batch by batch.

    ``images`` are pictures, as `Preprocessing.batch` takes them; or a floating tensor (B, C, height, width) that is
    prepared already.

    Raises:
        ValueError: if the name, a layer, an option or an image is not possible.
        TypeError: if ``model`` is neither a name nor a model nor a config, or an image is none.
    """
    if isinstance(model, nn.Module):
        shared = {id(weight): weight for weight in itertools.chain(model.parameters(), model.buffers())}
        model = copy.deepcopy(model, shared)
    backbone = create_backbone(model, layers=layers, pretrained=pretrained, image_size=image_size, options=options)
    if isinstance(images, torch.Tensor) and images.is_floating_point():
        batch = images.to(backbone.device)
    else:
        batch = backbone.prepare(images)
    with torch.no_grad():
        features: FeatureMaps = backbone(batch)
    return features
