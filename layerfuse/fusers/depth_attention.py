"""Attention over depth: each patch chooses, head by head, which layers it reads. Of layerfuse's own making.

With x_l the maps of the L layers, x_q the query layer's, s_l learned scales per channel, and heads slices of channels:

    a   = softmax over l of the logits, for each token and head
    out = sum_l a_l * s_l * x_l                     start="mean": s_l = 1, logits 0
    out = x_q + sum_l a_l * s_l * x_l               start="query_layer": s_l = 0, logits 0

    logits of layer l, one per head = W_l RMSNorm(x_q) + b_l                           logits="query"
                                    = sum over the head's channels of w * RMSNorm(x_l), + b_l     logits="own"

The softmax over layers that read themselves is that of attention residuals (arXiv:2603.15031), there in a language
model; that the deep token decides for all layers, the heads and the scales are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, Fuser
from layerfuse.ops import check_heads

__all__ = ["DepthAttention"]

_LOGITS = ("query", "own")
_STARTS = ("mean", "query_layer")
_EPS = 1e-6


@FUSERS.register("depth_attention")
class DepthAttention(Fuser):
    """Sum the maps with weights that each token and head takes from a softmax over the layers.

    A patch reads its own cell only, so that the cost grows with the number of patches and layers as that of an average
    does. With all logits zero, as at the start, it is the average; with one logit far above the others, `select`.

    Args:
        in_channels: C of every map; they share one width and one grid.
        num_layers: number of maps L.
        num_heads: M, slices of the channels that choose for themselves; must divide C.
        logits: ``"query"``: the query map's token decides how much each layer counts; ``"own"``: each layer's token
            speaks for itself, with L times fewer parameters.
        start: ``"mean"``: starts as `average`. ``"query_layer"``: the sum is added to the query map, and its scales are
            zero at the start, so that the output is the query map to the bit, in every precision, and the scales of all
            layers learn from the first step on.
        query_index: position of the query map among the L; negative counts from the end.

    Raises:
        ValueError: if the heads do not divide the channels, there is no such query map, or a name is unknown.
    """

    equal_channels = True

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        num_heads: int = 16,
        logits: str = "query",
        start: str = "mean",
        query_index: int = -1,
    ) -> None:
        super().__init__(in_channels, num_layers)
        self._check_choice("logits", logits, _LOGITS)
        self._check_choice("start", start, _STARTS)
        self._check_index("query_index", query_index)
        channels = self.in_channels[0]
        check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.logits = logits
        self.start = start
        self.query_index = query_index % num_layers
        keys = (num_layers * num_heads, channels) if logits == "query" else (channels,)
        self.key_weight = nn.Parameter(torch.empty(keys))
        self.key_bias = nn.Parameter(torch.empty(num_layers, num_heads))
        self.value_scale = nn.Parameter(torch.empty(num_layers, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all logits to zero, and the scales to one, or to zero where the query map stands by itself."""
        nn.init.zeros_(self.key_weight)
        nn.init.zeros_(self.key_bias)
        nn.init.constant_(self.value_scale, 1.0 if self.start == "mean" else 0.0)

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...] | None:
        """Return MMFuser's five layers of CLIP-L (24 blocks), so that the two can be compared."""
        return (3, 8, 13, 18, 23) if depth == 24 else None

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted sum: (B, N, C)."""
        maps, heads = features.maps, (self.num_heads, -1)
        weights = self._weights(maps).unsqueeze(-1)
        scales = self.value_scale.to(maps[0].dtype).unflatten(-1, heads)
        query = maps[self.query_index].unflatten(-1, heads)
        fused = query if self.start == "query_layer" else torch.zeros_like(query)
        # Weights and scales first: with frozen maps, nothing as large as a map is kept for the backward pass.
        for tokens, weight, scale in zip(maps, weights.unbind(2), scales, strict=True):
            fused = torch.addcmul(fused, tokens.unflatten(-1, heads), weight * scale)
        return fused.flatten(-2)

    def layer_weights(self, features: FeatureMaps) -> torch.Tensor:
        """Return how much each patch reads of each layer: the softmax alone, without scales and query map.

        Args:
            features: L maps, as in ``forward``.

        Returns:
            (B, M, L, H, W) in the fuser's precision; sums to one over L. Its mean over M is one picture per layer.

        Raises:
            ValueError: if number, widths or grids of the maps are not what the fuser was built for.
        """
        self._check_maps(features)
        weights = self._weights(features.to(self.key_bias.dtype).maps)
        return weights.permute(0, 3, 2, 1).unflatten(-1, features.grids[0])

    def layer_shares(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return what each layer's channels are multiplied with, softmax times scale, in the mean over channels.

        The query map counts once more where the sum is added to it (``start="query_layer"``).

        Returns:
            (B, L, H, W); sizes without sign, which sum to one over L.

        Raises:
            ValueError: if number, widths or grids of the maps are not what the fuser was built for.
        """
        with torch.no_grad():
            weights = self.layer_weights(features)  # (B, M, L, H, W)
            scales = self.value_scale.unflatten(-1, (self.num_heads, -1)).permute(1, 0, 2)  # (M, L, C/M)
            factors = torch.einsum("bmlhw,mlc->bmclhw", weights, scales)
            if self.start == "query_layer":
                factors[:, :, :, self.query_index] += 1
            sizes = factors.abs().mean((1, 2))
            return sizes / sizes.sum(1, keepdim=True).clamp_min(1e-12)

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count one multiply-add for each number of the maps, and as many where each layer gives its own logits."""
        sums = 2 if self.logits == "own" else 1
        return sums * 2 * self.num_layers * self.num_tokens(grids) * self.out_channels

    def _weights(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the weight of each layer for each token and head: (B, N, L, M)."""
        if self.logits == "query":
            query = maps[self.query_index]
            products = F.linear(query, self.key_weight) * _inverse_rms(query)
            logits = products.unflatten(-1, self.key_bias.shape)
        else:
            logits = torch.stack([self._own_logits(tokens) for tokens in maps], dim=2)
        return (logits + self.key_bias).softmax(2).to(maps[0].dtype)

    def _own_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        products = (tokens * self.key_weight).unflatten(-1, (self.num_heads, -1)).sum(-1)
        return products * _inverse_rms(tokens)


def _inverse_rms(tokens: torch.Tensor) -> torch.Tensor:
    """Return what RMSNorm scales tokens with, (B, N, 1); a product with them may be scaled in their place."""
    precision = torch.promote_types(tokens.dtype, torch.float32)
    square = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=precision).square()
    return torch.rsqrt(square / tokens.shape[-1] + _EPS).to(tokens.dtype)
