"""One layer, unchanged: what LLaVA-1.5 (arXiv:2310.03744) does with the penultimate layer. The baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, Fuser

__all__ = ["Select"]


@FUSERS.register("select")
class Select(Fuser):
    """Return one of the maps as it is; no parameters.

    Args:
        in_channels: C of every map, or one number per map.
        num_layers: number of maps L.
        index: position of the map among the L; negative counts from the end.

    Raises:
        ValueError: if there is no such map.
    """

    equal_grids = False

    def __init__(self, in_channels: int | Sequence[int], num_layers: int, *, index: int = -1) -> None:
        super().__init__(in_channels, num_layers)
        self._check_index("index", index)
        self.index = index
        self.out_channels = self.in_channels[index]

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...] | None:
        """Return the penultimate layer, whatever the depth."""
        return (depth - 1,)

    def layer_shares(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return 1 for the map that is selected, (B, L)."""
        shares = torch.zeros(features.batch_size, self.num_layers)
        shares[:, self.index] = 1
        return shares

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the chosen map: (B, N, C)."""
        return features.maps[self.index]

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        """Return the chosen map's grid."""
        return grids[self.index]
