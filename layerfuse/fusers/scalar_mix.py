"""One learned weight per layer: the scalar mix of ELMo (arXiv:1802.05365), equation 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, Fuser

__all__ = ["ScalarMix"]


@FUSERS.register("scalar_mix")
class ScalarMix(Fuser):
    """Sum the maps with softmax weights, times a learned scale; L + 1 parameters. Starts as the average.

    Args:
        in_channels: C of every map.
        num_layers: number of maps L.
    """

    equal_channels = True

    def __init__(self, in_channels: int | Sequence[int], num_layers: int) -> None:
        super().__init__(in_channels, num_layers)
        self.layer_logits = nn.Parameter(torch.empty(num_layers))
        # One element, not a scalar: fully_shard (FSDP2) refuses parameters without dimensions.
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights equal and the scale to one."""
        nn.init.zeros_(self.layer_logits)
        nn.init.ones_(self.scale)

    @property
    def layer_weights(self) -> torch.Tensor:
        """The weight of each layer, (L,); they sum to one."""
        return self.layer_logits.softmax(0)

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted sum: (B, N, C)."""
        factors = (self.scale * self.layer_weights).to(features.maps[0].dtype)
        return (torch.stack(features.maps) * factors[:, None, None, None]).sum(0)

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count one multiply-add for each number of the maps."""
        return 2 * self.num_layers * self.num_tokens(grids) * self.out_channels
