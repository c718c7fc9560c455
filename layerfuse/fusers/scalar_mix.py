"""One learned weight per layer: the scalar mix of ELMo, or the depth-weighted average of DenseFormer.

ELMo (arXiv:1802.05365), equation 1: softmax weights times a learned scale. DenseFormer (arXiv:2402.02622,
epfml/DenseFormer): weights without a softmax, one-hot at the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, Fuser

__all__ = ["ScalarMix"]

_NORMALISE = ("softmax", "none")
_STARTS = ("mean", "query_layer")


@FUSERS.register("scalar_mix")
class ScalarMix(Fuser):
    """Sum the maps with one learned weight each; L + 1 parameters, or L without softmax. Starts as the average.

    Args:
        in_channels: C of every map.
        num_layers: number of maps L.
        normalise: ``"softmax"``: positive weights that sum to one, times a learned scale, as in ELMo. ``"none"``: any
            weights and no scale, as in DenseFormer.
        start: ``"mean"``: all weights equal. ``"query_layer"``, without softmax only: one for the query map, zero for
            the others, so that training starts as ``select``; DenseFormer's start.
        query_index: position of the query map among the L; negative counts from the end.

    Raises:
        ValueError: if ``normalise`` or ``start`` is unknown, they exclude one another, or there is no such query map.
    """

    equal_channels = True

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        normalise: str = "softmax",
        start: str = "mean",
        query_index: int = -1,
    ) -> None:
        super().__init__(in_channels, num_layers)
        self._check_choice("normalise", normalise, _NORMALISE)
        self._check_choice("start", start, _STARTS)
        if start == "query_layer" and normalise == "softmax":
            raise InputError(
                "fuser 'scalar_mix' cannot start at the query layer with normalise='softmax', which leaves every layer "
                "a weight; give normalise='none', or start='mean'."
            )
        self._check_index("query_index", query_index)
        self.normalise = normalise
        self.start = start
        self.query_index = query_index
        if normalise == "softmax":
            self.layer_logits = nn.Parameter(torch.empty(num_layers))
            # One element, not a scalar: fully_shard (FSDP2) refuses parameters without dimensions.
            self.scale = nn.Parameter(torch.empty(1))
        else:
            self.layer_factors = nn.Parameter(torch.empty(num_layers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights as ``start`` says, and the scale to one."""
        if self.normalise == "softmax":
            nn.init.zeros_(self.layer_logits)
            nn.init.ones_(self.scale)
        elif self.start == "mean":
            nn.init.constant_(self.layer_factors, 1 / self.num_layers)
        else:
            nn.init.zeros_(self.layer_factors)
            self.layer_factors[self.query_index] = 1

    @property
    def layer_weights(self) -> torch.Tensor:
        """The weight of each layer, (L,), without the scale; after a softmax they sum to one."""
        return self.layer_logits.softmax(0) if self.normalise == "softmax" else self.layer_factors

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted sum: (B, N, C)."""
        weights = self.scale * self.layer_weights if self.normalise == "softmax" else self.layer_weights
        factors = weights.to(features.maps[0].dtype)
        return (torch.stack(features.maps) * factors[:, None, None, None]).sum(0)

    def layer_shares(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the size of each layer's weight, of the sum of all sizes: (B, L)."""
        sizes = self.layer_weights.detach().abs()
        return (sizes / sizes.sum().clamp_min(1e-12)).expand(features.batch_size, -1)

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count one multiply-add for each number of the maps."""
        return 2 * self.num_layers * self.num_tokens(grids) * self.out_channels
