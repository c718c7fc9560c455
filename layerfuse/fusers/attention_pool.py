"""Molmo2's pooling: one token per window of patches, which attends to the window's patches in several layers.

Source: transformers' ``Molmo2Adapter`` (models/molmo2) without its projector, and Molmo (arXiv:2409.17146), section 2.

With x_p the channels of all layers of patch p side by side, for each window of patches:

    out = W_o attention(query = mean of x_p, keys and values = x_p), over the patches p of the window
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, Fuser
from layerfuse.ops import check_heads

__all__ = ["AttentionPool"]


@FUSERS.register("attention_pool")
class AttentionPool(Fuser):
    """Pool windows of patches by attention: window * window times fewer tokens, from all layers.

    A grid that windows do not divide is padded on both sides, the odd row or column behind, as Molmo2 pads it; padding
    takes no part in mean and attention. Parameters are named as in transformers' Molmo2, so that weights of its
    ``image_pooling_2d`` fit. Starts with random weights, as Molmo2 does.

    Args:
        in_channels: C of every map, or one number per map. All maps share one grid.
        num_layers: number of maps L.
        window: edge of a window, in patches.
        num_heads: M; must divide ``out_channels``.
        out_channels: C_out; if left out, the width of the last map.

    Raises:
        ValueError: if a count is below 1, or the heads do not divide the output channels.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        window: int = 2,
        num_heads: int = 16,
        out_channels: int | None = None,
    ) -> None:
        super().__init__(in_channels, num_layers, out_channels=out_channels)
        self._check_count("window", window)
        self._check_count("out_channels", self.out_channels)
        check_heads(self.out_channels, num_heads)
        self.window = window
        self.num_heads = num_heads
        width = sum(self.in_channels)
        self.q_proj = nn.Linear(width, self.out_channels)
        self.k_proj = nn.Linear(width, self.out_channels)
        self.v_proj = nn.Linear(width, self.out_channels)
        self.o_proj = nn.Linear(self.out_channels, self.out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights as Molmo2 does: normal with a standard deviation of 0.02, no bias."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...] | None:
        """Return Molmo2's layers of SigLIP 2 (27 blocks), or Molmo's of CLIP-L (24 blocks), the deep one first."""
        return {27: (25, 19), 24: (22, 15)}.get(depth)

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return one token per window: (B, N, C_out)."""
        grid, heads = features.grids[0], (self.num_heads, -1)
        patches = self._windows(torch.cat(features.maps, dim=-1).unflatten(1, grid))
        inside = self._inside(patches, grid)
        mean = patches.mean(2) if inside is None else patches.sum(2) / inside.sum(1, keepdim=True).to(patches.dtype)
        query = self.q_proj(mean).unflatten(-1, heads)
        key, value = (projection(patches).unflatten(-1, heads) for projection in (self.k_proj, self.v_proj))
        logits = torch.einsum("bnmd,bnpmd->bnmp", query, key) * query.shape[-1] ** -0.5
        if inside is not None:
            logits = logits.masked_fill(~inside[:, None, :], float("-inf"))
        attended = torch.einsum("bnmp,bnpmd->bnmd", logits.softmax(-1).to(value.dtype), value)
        fused: torch.Tensor = self.o_proj(attended.flatten(-2))
        return fused

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        """Return the number of windows along height and width: those of the maps over ``window``, rounded up."""
        height, width = grids[-1]
        return -(-height // self.window), -(-width // self.window)

    def _windows(self, cells: torch.Tensor) -> torch.Tensor:
        """Cut (B, H, W, C) cells, padded with zeros, into windows: (B, N, window * window, C)."""
        down, right = (-size % self.window for size in cells.shape[1:3])
        padded = F.pad(cells, (0, 0, right // 2, right - right // 2, down // 2, down - down // 2))
        return rearrange(padded, "b (h i) (w j) c -> b (h w) (i j) c", i=self.window, j=self.window)

    def _inside(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor | None:
        """Return which patches of each window lie on the grid: (N, window * window), or None if all do."""
        height, width = grid
        if height % self.window == 0 and width % self.window == 0:
            return None
        return self._windows(patches.new_ones(1, height, width, 1)).squeeze(0).squeeze(-1) > 0
