"""The plain mean over layers: no parameters, no choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, Fuser

__all__ = ["Average"]


@FUSERS.register("average")
class Average(Fuser):
    """Average the maps; no parameters. All maps share one grid and one width.

    Args:
        in_channels: C of every map.
        num_layers: number of maps L.
    """

    equal_channels = True

    def __init__(self, in_channels: int | Sequence[int], num_layers: int) -> None:
        super().__init__(in_channels, num_layers)

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the mean map: (B, N, C)."""
        return torch.stack(features.maps).mean(0)

    def layer_shares(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return one share for all, (B, L)."""
        return torch.full((features.batch_size, self.num_layers), 1 / self.num_layers)

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count one multiply-add for each number of the maps."""
        return 2 * self.num_layers * self.num_tokens(grids) * self.out_channels
