"""MMFuser's structure (arXiv:2410.11829, section 3) with dense attention: each query patch looks at every value patch.

With q the query map, f_1 ... f_{L-1} the others, LN layer norms, and g1, g2 learned scales per channel:

    a   = attention(LN_q(q), LN_f([f_1, ..., f_{L-1}]))
    out = q + g1 * (a + g2 * attention(LN_1(a), LN_1(a)))

Attention is that of arXiv:1706.03762, section 3.2.2. g1 = g2 = 0 at the start, as in MMFuser.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, Fuser, all_but
from layerfuse.ops import ChannelScale, check_heads

__all__ = ["CrossAttention"]


@FUSERS.register("cross_attention")
class CrossAttention(Fuser):
    """Enrich one map with what dense attention finds in the others, anywhere. Their grids may differ.

    By nature the cost grows with the square of the number of patches, N * S products for S value patches, where
    `mmfuser` reads a few points per patch. Memory does not, where torch has a fused attention. Value patches carry no
    mark of their layer or place but what the backbone wrote into them: the order of the value maps does not matter.

    Starts as the query map, to the bit.

    Args:
        in_channels: C of every map; they share one width.
        num_layers: number of maps L, at least 2: one query, L - 1 maps of values.
        num_heads: M; must divide C.
        query_index: position of the query map among the L; negative counts from the end.
        norm_eps: epsilon of the three layer norms.

    Raises:
        ValueError: if there is no value map, no such query map, ``norm_eps`` is not above 0, or the heads do not divide
            the channels.
    """

    equal_grids = False
    equal_channels = True

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        num_heads: int = 16,
        query_index: int = -1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(in_channels, num_layers)
        if num_layers < 2:
            raise InputError(
                f"fuser 'cross_attention' got num_layers={num_layers}; it needs at least 2, one query map and one "
                "value map. For a single map use 'select'."
            )
        self._check_index("query_index", query_index)
        self._check_positive("norm_eps", norm_eps)
        channels = self.in_channels[0]
        check_heads(channels, num_heads)
        self.query_index = query_index % num_layers
        self.query_norm = nn.LayerNorm(channels, eps=norm_eps)
        self.feat_norm = nn.LayerNorm(channels, eps=norm_eps)
        self.cross_attn = _DenseAttention(channels, num_heads)
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.self_attn = _DenseAttention(channels, num_heads)
        self.self_scale = ChannelScale(channels)
        self.output_scale = ChannelScale(channels)

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...] | None:
        """Return MMFuser's five layers of CLIP-L (24 blocks), the query last."""
        return (3, 8, 13, 18, 23) if depth == 24 else None

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Enrich the query map: (B, N, C) on the query map's grid."""
        query = features.maps[self.query_index]
        values = torch.cat(all_but(features.maps, self.query_index), dim=1)
        attended = self.cross_attn(self.query_norm(query), self.feat_norm(values))
        inner = self.norm1(attended)
        refined = attended + self.self_scale(self.self_attn(inner, inner))
        fused: torch.Tensor = query + self.output_scale(refined)
        return fused

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        """Return the query map's grid."""
        return grids[self.query_index]


class _DenseAttention(nn.Module):
    """Multi-head attention of (B, Q, C) queries to (B, S, C) values, which are their own keys."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(channels, channels)
        # A bias would add the same number to all logits of a query, which the softmax takes out again.
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels)
        self.o_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights as MMFuser's projections draw theirs: Xavier's uniform, no bias."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, query: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return what each query found: (B, Q, C)."""
        heads = (self.num_heads, -1)
        projected = (self.q_proj(query), self.k_proj(values), self.v_proj(values))
        split = (tokens.unflatten(-1, heads).transpose(1, 2) for tokens in projected)
        attended = F.scaled_dot_product_attention(*split)
        output: torch.Tensor = self.o_proj(attended.transpose(1, 2).flatten(-2))
        return output
