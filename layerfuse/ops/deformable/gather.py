"""Deformable attention as ONE weighted ``embedding_bag`` over the bilinear corners of all points of all levels.

Bilinear interpolation of K points on L levels is a weighted sum of 4*L*K rows of the value table, so that one
``embedding_bag`` replaces L calls of ``grid_sample`` and the tensors of sampled points between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

__all__ = ["gather"]

# Lookups and rows that 32 bits can number: half the traffic of 64, and a faster sort in embedding_bag's backward.
_MOST_LOOKUPS = 2**31 - 1
# Here embedding_bag has weights and gradients; elsewhere (mps) the rows are taken and summed.
_BAG_DEVICES = frozenset({"cpu", "cuda", "meta"})


def gather(
    value: torch.Tensor, grids: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Look the corners of all sampling points up in one call and sum them, weighted, per query and head.

    A batch with more lookups than 32 bits can number is taken in parts.

    Arguments and result are those of ``deformable_attention``, its numbers all of one floating point type.
    """
    batch_size, num_values, num_heads, _ = value.shape
    _, num_queries, _, num_levels, num_points, _ = locations.shape
    per_image = num_heads * max(num_values, 4 * num_queries * num_levels * num_points)
    if batch_size * per_image <= _MOST_LOOKUPS or batch_size == 1:
        return _gather(value, grids, locations, weights)
    size = max(1, _MOST_LOOKUPS // per_image)
    parts = zip(value.split(size), locations.split(size), weights.split(size), strict=True)
    return torch.cat([_gather(part, grids, places, factors) for part, places, factors in parts])


def _gather(
    value: torch.Tensor, grids: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    batch_size, num_values, num_heads, head_channels = value.shape
    num_queries = locations.shape[1]
    num_rows = batch_size * num_values * num_heads
    lookups = 2 * locations.numel()  # four corners for each pair of coordinates
    index_type = torch.int32 if max(num_rows, lookups) <= _MOST_LOOKUPS else torch.int64
    image = torch.arange(batch_size, device=value.device, dtype=index_type).view(-1, 1, 1, 1, 1, 1) * num_values
    head = torch.arange(num_heads, device=value.device, dtype=index_type).view(-1, 1, 1, 1)
    rows, factors = [], []
    start = 0
    for first, last in _runs(grids):
        height, width = grids[first]
        points = locations[:, :, :, first:last]
        column, column_factor = _cells(points[..., 0], width, index_type)
        row, row_factor = _cells(points[..., 1], height, index_type)
        level = torch.arange(last - first, device=value.device, dtype=index_type).view(-1, 1, 1) * (height * width)
        # All that can be folded into one axis is folded before the outer sum and product, which are twice as large.
        row = (row * width + (level + image + start)) * num_heads + head
        row_factor = row_factor * weights[:, :, :, first:last, :, None]
        rows.append((row.unsqueeze(-1) + (column * num_heads).unsqueeze(-2)).flatten(3))
        factors.append((row_factor.unsqueeze(-1) * column_factor.unsqueeze(-2)).flatten(3))
        start += (last - first) * height * width
    summed = _weighted_sum(value.reshape(num_rows, head_channels), _joined(rows), _joined(factors))
    return summed.view(batch_size, num_queries, num_heads * head_channels)


def _weighted_sum(table: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Sum rows of a (R, C) table with their factors, both (…, K): (n, C) for the n places before K."""
    rows, factors = rows.flatten(0, 2), factors.flatten(0, 2)
    if table.device.type in _BAG_DEVICES:
        return F.embedding_bag(rows, table, mode="sum", per_sample_weights=factors)
    taken = table.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return (taken * factors.unsqueeze(-1)).sum(1)


def _cells(coordinate: torch.Tensor, size: int, index_type: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two cells around each of (...) places in [0, 1] along an axis of ``size`` cells, and their weights.

    Both are (..., 2): the indices are clamped into the map; the weights are linear in the distance, zero outside the
    map.
    """
    position = coordinate * size - 0.5
    lower = position.floor()
    fraction = position - lower
    cells = torch.stack((lower, lower + 1), dim=-1)
    factors = torch.stack((1 - fraction, fraction), dim=-1)
    inside = (cells >= 0) & (cells <= size - 1)
    # A product, not a choice: a location that is NaN must stay visible in the output, as with grid_sample.
    # Clamped as integers: a float that is NaN or huge has no defined integer, but any integer can be clamped.
    return cells.to(index_type).clamp(0, size - 1), factors * inside


def _runs(grids: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Split the levels into runs of one grid, as (first, last + 1): each run is computed in one go."""
    edges = [index for index in range(1, len(grids)) if grids[index] != grids[index - 1]]
    return list(zip([0, *edges], [*edges, len(grids)], strict=True))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate the runs of each bag; with one run, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
