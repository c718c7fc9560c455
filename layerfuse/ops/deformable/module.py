"""The deformable attention layer: the projections around ``deformable_attention`` (arXiv:2010.04159, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from layerfuse.errors import InputError
from layerfuse.ops.deformable.attention import check_implementation, deformable_attention
from layerfuse.ops.heads import check_heads

__all__ = ["MultiScaleDeformableAttention", "set_implementation"]


class MultiScaleDeformableAttention(nn.Module):
    """Attention in which each query reads a few learned points around its own cell, on every level.

    Parameters are named as in Deformable DETR, so that published weights fit.

    Args:
        channels: C, width of queries, values and output.
        num_heads: M; must divide ``channels``.
        num_levels: L, number of value maps.
        num_points: K, sampling points per head and level.
        implementation: which path of ``deformable_attention`` to take.

    Raises:
        ValueError: if the heads do not divide the channels, a count is below 1, or the implementation is unknown.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 16,
        num_levels: int = 1,
        num_points: int = 4,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        for name, count in (("num_levels", num_levels), ("num_points", num_points)):
            if count < 1:
                raise InputError(f"{name} is {count}; expected at least 1.")
        check_implementation(implementation)
        self.channels = channels
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.implementation = implementation
        self.sampling_offsets = nn.Linear(channels, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(channels, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published: head m looks in direction 2*pi*m/M, its k-th point k cells away; equal weights."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        # The farther of the two axes moves exactly k cells, so the heads walk along a square, not a circle.
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        ring = directions[:, None, None, :] * steps[None, None, :, None]
        ring = ring.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(ring.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: torch.Tensor,
        query_grid: tuple[int, int],
        values: torch.Tensor,
        value_grids: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Return the attention, (B, Q, C), of every query cell to points around the same place on each level.

        ``query`` is (B, Q, C), row-major over its grid; ``values`` (B, S, C) are those of all levels one after another.
        Grids are (H, W), in patches.
        """
        value = self.value_proj(values).unflatten(-1, (self.num_heads, -1))
        locations, weights = self.sampling_points(query, query_grid, value_grids)
        attended = deformable_attention(value, value_grids, locations, weights, implementation=self.implementation)
        projected: torch.Tensor = self.output_proj(attended)
        return projected

    def sampling_points(
        self, query: torch.Tensor, query_grid: tuple[int, int], value_grids: Sequence[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where each query reads, and how much each place counts; arguments as in ``forward``.

        Returns:
            (B, Q, M, L, K, 2) places (x, y), where 0 and 1 are the outer edges of the map, and (B, Q, M, L, K) weights,
            which sum to 1 over L and K; both float32 at least.
        """
        offsets = self.sampling_offsets(query)
        # A location in bfloat16 is off by up to half a cell on a 128-wide grid, so places are float32 at least.
        precision = torch.promote_types(offsets.dtype, torch.float32)
        offsets = offsets.to(precision).unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        locations = _locations(query_grid, value_grids, offsets)
        logits = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))
        return locations, logits.softmax(-1, dtype=precision).unflatten(-1, (self.num_levels, self.num_points))

    def matmul_flops(self, num_queries: int, num_values: int) -> int:
        """Count floating point operations of the four projections per image, as 2 * multiply-adds."""
        per_query = self.sampling_offsets.out_features + self.attention_weights.out_features + self.channels
        return 2 * self.channels * (num_queries * per_query + num_values * self.channels)

    def sampling_flops(self, num_queries: int) -> int:
        """Count floating point operations of the sum of four corners per point per image, as 2 * multiply-adds."""
        return 2 * num_queries * self.num_levels * self.num_points * 4 * self.channels


def set_implementation(model: nn.Module, implementation: str) -> None:
    """Set the path, as in ``deformable_attention``, that every deformable attention layer of a model takes, in place.

    Raises:
        ValueError: if the implementation is unknown; nothing was changed.
    """
    check_implementation(implementation)
    for module in model.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            module.implementation = implementation


def _locations(
    query_grid: tuple[int, int], value_grids: Sequence[tuple[int, int]], offsets: torch.Tensor
) -> torch.Tensor:
    """Return the sampling places (x, y) in [0, 1], (B, Q, M, L, K, 2): the centre of the query's cell, plus the offset.

    ``offsets``, of the same shape, are in cells of their level.
    """
    height, width = query_grid
    centres = torch.stack(
        (_centres(width, offsets).expand(height, width), _centres(height, offsets)[:, None].expand(height, width)),
        dim=-1,
    )
    # Filled where they lie: a list would have to be copied to the device. (L, 1, 2), to divide (…, L, K, 2).
    sizes = torch.stack([offsets.new_full((), size) for level in value_grids for size in reversed(level)])
    return torch.addcdiv(centres.view(-1, 1, 1, 1, 2), offsets, sizes.view(-1, 1, 2))


def _centres(size: int, like: torch.Tensor) -> torch.Tensor:
    """Return the centres of the cells along one axis, in [0, 1]: (size,)."""
    return (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size
