"""Deformable attention by ``grid_sample``, level by level: short, slow, the oracle of the other paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

__all__ = ["reference"]


def reference(
    value: torch.Tensor, grids: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sample each level with ``grid_sample`` and add the weighted points up.

    Arguments and result are those of ``deformable_attention``, its numbers all of one floating point type.
    """
    levels = value.split([height * width for height, width in grids], dim=1)
    output = value.new_zeros(())
    for index, (level, (height, width)) in enumerate(zip(levels, grids, strict=True)):
        image = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))
        points = 2 * locations[:, :, :, index].transpose(1, 2).flatten(0, 1) - 1
        sampled = F.grid_sample(image, points, mode="bilinear", padding_mode="zeros", align_corners=False)
        level_weights = weights[:, :, :, index].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        output = output + (sampled * level_weights).sum(-1)
    batch_size, _, num_heads, _ = value.shape
    return output.unflatten(0, (batch_size, num_heads)).permute(0, 3, 1, 2).flatten(2)
