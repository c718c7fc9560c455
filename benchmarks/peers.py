"""What others have for deformable attention, each behind one signature; a package that is absent is no error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from layerfuse import FeatureMaps

__all__ = ["Attend", "DenseCrossAttention", "deformops_attention", "is_installed", "transformers_attention"]

Grid = tuple[int, int]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Value (B, S, M, C/M), locations (B, Q, M, L, K, 2), weights (B, Q, M, L, K) -> (B, Q, C)."""


def is_installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def transformers_attention(grids: Sequence[Grid], device: str) -> Attend:
    """Return transformers' deformable attention, which Grounding DINO has: one ``grid_sample`` per level."""
    from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention

    layer = MultiScaleDeformableAttention()
    shapes, starts = _shapes(grids, device)

    def attend(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # grid_sample wants one dtype, so its user has places in the dtype of the values.
        return layer(value, shapes, list(grids), starts, locations.to(value.dtype), weights.to(value.dtype), 64)

    return attend


def deformops_attention(grids: Sequence[Grid], device: str) -> Attend:
    """Return deformops' multi-scale deformable attention, with the backend that it chooses itself."""
    from deformops.registry import msda

    shapes, starts = _shapes(grids, device)

    def attend(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return msda(value, shapes, starts, locations, weights.to(value.dtype))

    return attend


def _shapes(grids: Sequence[Grid], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = torch.tensor(list(grids), device=device)
    areas = shapes.prod(1)
    return shapes, areas.cumsum(0) - areas


class DenseCrossAttention(nn.Module):
    """MMFuser's block with dense multi-head attention (SDPA) in both places."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(channels, eps=1e-6) for _ in range(3))
        self.projections = nn.ModuleList(nn.Linear(channels, channels) for _ in range(8))

    def _attend(self, query: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
        to_query, to_key, to_value, to_output = self.projections[first : first + 4]

        def split(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            split(to_query(query)), split(to_key(values)), split(to_value(values))
        )
        return to_output(attended.transpose(1, 2).flatten(2))

    def forward(self, features: FeatureMaps) -> torch.Tensor:
        """Fuse L maps (B, N, C) into (B, N, C)."""
        query = features.maps[-1]
        attended = self._attend(self.norms[0](query), self.norms[1](torch.cat(features.maps[:-1], dim=1)), 0)
        inner = self.norms[2](attended)
        return query + attended + self._attend(inner, inner, 4)
