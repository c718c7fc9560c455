"""Deformable attention by ``grid_sample``, level by level: short, slow, the oracle of the other paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

__all__ = ["reference", "reference_gradients"]


def reference(
    value: torch.Tensor, grids: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sample each level with ``grid_sample`` and add the weighted points up.

    Arguments and result are those of ``deformable_attention``, its numbers all of one floating point type.
    """
    output = value.new_zeros(())
    for image, points, level_weights in _levels(value, grids, locations, weights):
        output = output + (_sample(image, points) * level_weights).sum(-1)
    batch_size, _, num_heads, _ = value.shape
    return output.unflatten(0, (batch_size, num_heads)).permute(0, 3, 1, 2).flatten(2)


def reference_gradients(
    grad_output: torch.Tensor,
    value: torch.Tensor,
    grids: Sequence[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
    *,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of value, locations and weights where autograd does not run: inside of an operator.

    Those that are not ``wanted`` are None. ``grad_output`` and ``value`` may be of lower precision than the others.
    """
    batch_size, _, num_heads, _ = value.shape
    precise = value.to(locations.dtype)
    grad_attended = grad_output.to(locations.dtype).unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)
    of_value, of_locations, of_weights = [], [], []
    for image, points, level_weights in _levels(precise, grids, locations, weights):
        if wanted[0] or wanted[1]:
            grad_image, grad_points = torch.ops.aten.grid_sampler_2d_backward(
                grad_attended.unsqueeze(-1) * level_weights, image, points, 0, 0, False, [wanted[0], True]
            )
            of_locations.append(2 * grad_points)
            if wanted[0]:
                of_value.append(grad_image.flatten(2))
        if wanted[2]:
            of_weights.append((_sample(image, points) * grad_attended.unsqueeze(-1)).sum(1))
    heads = (batch_size, num_heads)
    return (
        torch.cat(of_value, dim=2).unflatten(0, heads).permute(0, 3, 1, 2).to(value.dtype).contiguous()
        if wanted[0]
        else None,
        torch.stack(of_locations, dim=2).unflatten(0, heads).transpose(1, 2).contiguous() if wanted[1] else None,
        torch.stack(of_weights, dim=2).unflatten(0, heads).transpose(1, 2).contiguous() if wanted[2] else None,
    )


def _levels(
    value: torch.Tensor, grids: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield, of each level, the maps (B*M, C/M, H, W), the points (B*M, Q, K, 2) and the weights (B*M, 1, Q, K)."""
    levels = value.split([height * width for height, width in grids], dim=1)
    for index, (level, (height, width)) in enumerate(zip(levels, grids, strict=True)):
        image = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))
        points = 2 * locations[:, :, :, index].transpose(1, 2).flatten(0, 1) - 1
        yield image, points, weights[:, :, :, index].transpose(1, 2).flatten(0, 1).unsqueeze(1)


def _sample(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the values at the points, (B*M, C/M, Q, K)."""
    return F.grid_sample(image, points, mode="bilinear", padding_mode="zeros", align_corners=False)
