"""Inputs of deformable attention that tests draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def drawn_inputs(
    grids: Sequence[tuple[int, int]],
    *,
    batch_size: int = 2,
    num_queries: int = 5,
    num_heads: int = 3,
    head_channels: int = 4,
    num_points: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw value, locations and weights; about half of the points lie outside the map."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    value = draw(batch_size, sum(h * w for h, w in grids), num_heads, head_channels)
    locations = draw(batch_size, num_queries, num_heads, len(grids), num_points, 2) * 0.8 + 0.5
    return value, locations, draw(batch_size, num_queries, num_heads, len(grids), num_points)
