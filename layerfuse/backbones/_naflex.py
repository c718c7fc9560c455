"""A padded batch of pictures of several grids through a backbone: checked before, and taken apart behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps
from layerfuse.preprocessing import PatchBatch
from layerfuse.taps import as_features

__all__ = ["as_patches", "each_picture"]


def as_patches(
    images: PatchBatch | Mapping[str, Any], *, values: tuple[int, int, int], model: nn.Module, takes_patches: bool
) -> PatchBatch:
    """Return the batch that a backbone is given, if it can take it.

    Args:
        images: the batch, or the mapping that it is made from.
        values: (channels, height, width) of a patch of this model.
        model: of the backbone.
        takes_patches: whether it does.

    Raises:
        ValueError: if the model takes none, or others, or mask and shapes do not fit one another.
    """
    channels, height, width = values
    if not takes_patches:
        raise InputError(
            f"{type(model).__name__} takes images as one tensor (B, {channels}, height, width), of one size, and "
            "no patches with their grids. Prepare pictures with backbone.prepare(pictures), or take a NaFlex model: "
            "Siglip2VisionModel of transformers, naflexvit_* of timm."
        )
    batch = images if isinstance(images, PatchBatch) else PatchBatch.from_mapping(images)
    expected = channels * height * width
    if batch.patches.shape[2] != expected:
        raise InputError(
            f"patches have {batch.patches.shape[2]} values; this backbone takes {expected}: patches of "
            f"{height}x{width} pixels and {channels} channels, as backbone.prepare_patches(pictures) makes them."
        )
    return batch


def each_picture(
    hidden: Sequence[torch.Tensor], batch: PatchBatch, layers: tuple[int, ...], num_prefix_tokens: int
) -> list[FeatureMaps]:
    """Return feature maps of each picture, in order, as of a batch of one on its own grid; padding is left out.

    Args:
        hidden: of L layers, each (B, P + N, C); the result holds views of these.
        batch: B pictures of at most N patches.
        layers: their numbers.
        num_prefix_tokens: P.
    """
    return [
        as_features(
            [tokens[index : index + 1, : num_prefix_tokens + rows * columns] for tokens in hidden],
            layers,
            grids=[(rows, columns)] * len(layers),
            num_prefix_tokens=num_prefix_tokens,
        )
        for index, (rows, columns) in enumerate(batch.grids)
    ]
