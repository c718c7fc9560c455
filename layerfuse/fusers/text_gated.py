"""The instruction-guided vision aggregator (IGVA, arXiv:2501.08443): the question decides which depth is read.

The maps are cut into K groups of neighbouring layers. With P_k the mean of a group's maps, c_k the mean of its class
tokens, s the condition (any vector that stands for the question) and b the base map:

    x   = Linear(s)                        k_k = Linear(c_k)
    x  <- LN(x + attention(x over the k_k)), then LN(x + Linear(ReLU(Linear(x))))       ``num_attention_layers`` times
    out = channels [b | sum_k w_k P_k],    w = softmax(Linear(x))

The last linear layer is zero at the start: w = 1/K for every condition, as in the paper's first stage, which has no
gate yet. Formula read off YiZheng-zy/IGVA, multimodal_aggregator/aggregator.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, Fuser
from layerfuse.ops import check_heads

__all__ = ["TextGated"]

_KEYS = ("class", "mean")


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        """Set weights and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class GateLayer(nn.Module):
    """Attention of one query over the groups, and a feed-forward part; both with a layer norm behind the sum.

    Args:
        channels: C of the query and the groups.
        num_heads: M.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels, bias=False)  # softmax does not see a bias that all keys share
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, query: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Update the query.

        Args:
            query: (B, C).
            groups: (B, K, C).

        Returns:
            (B, C).
        """
        heads = (self.num_heads, query.shape[-1] // self.num_heads)
        asked = self.query(query).unflatten(-1, heads).unsqueeze(-2)  # (B, M, 1, C/M)
        keys = self.key(groups).unflatten(-1, heads).permute(0, 2, 3, 1)  # (B, M, C/M, K)
        values = self.value(groups).unflatten(-1, heads).transpose(1, 2)  # (B, M, K, C/M)
        weights = (asked @ keys * heads[1] ** -0.5).softmax(-1)
        attended = self.norm1(query + self.out((weights @ values).flatten(1)))
        updated: torch.Tensor = self.norm2(attended + self.feed_forward(attended))
        return updated


@FUSERS.register("text_gated")
class TextGated(Fuser):
    """One map beside the mean of all groups of maps, weighted by a condition such as an embedding of the question.

    Args:
        in_channels: C of every map; they share one width and one grid.
        num_layers: number of maps L.
        condition_channels: D_c of the condition.
        groups: K, into which the maps are cut in their order, as evenly as L allows (earlier groups take one more); or
            the number of maps of each group.
        base_index: position of the base map among the L; negative counts from the end. It also stays in its group.
        keys: what the gate sees of a map: ``"class"``, its first prefix token (where the backbone has none, the mean
            patch token); or ``"mean"``, always the mean patch token, for backbones whose prefix tokens are registers.
        num_attention_layers: of the gate.
        num_heads: of each of them.
        hidden_channels: width of the gate; if left out, C.

    Raises:
        ValueError: if the maps cannot be cut into such groups, there is no such base map, ``keys`` is unknown, a number
            is below 1, or the heads do not divide the gate's width.
    """

    equal_channels = True

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        condition_channels: int,
        groups: int | Sequence[int] = 4,
        base_index: int = -2,
        keys: str = "class",
        num_attention_layers: int = 4,
        num_heads: int = 4,
        hidden_channels: int | None = None,
    ) -> None:
        super().__init__(in_channels, num_layers)
        channels = self.in_channels[0]
        hidden = channels if hidden_channels is None else hidden_channels
        self._check_choice("keys", keys, _KEYS)
        self._check_index("base_index", base_index)
        self._check_count("condition_channels", condition_channels)
        self._check_count("num_attention_layers", num_attention_layers)
        self._check_count("hidden_channels", hidden)
        check_heads(hidden, num_heads)
        self.condition_channels = condition_channels
        self.group_sizes = _group_sizes(groups, num_layers)
        self.base_index = base_index
        self.keys = keys
        self.out_channels = 2 * channels
        self.condition_proj = nn.Linear(condition_channels, hidden)
        self.key_proj = nn.Linear(channels, hidden)
        self.layers = nn.ModuleList(GateLayer(hidden, num_heads) for _ in range(num_attention_layers))
        self.weight_head = _ZeroLinear(hidden, len(self.group_sizes))

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...] | None:
        """Return every block's output, as the paper taps of CLIP-L (24 blocks)."""
        return tuple(range(1, depth + 1))

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the base map and the weighted groups side by side: (B, N, 2C)."""
        assert condition is not None
        means = self._group_means(features.maps)
        weights = self._weights(features, means, condition)
        mixed = torch.stack([weights[:, k, None, None] * mean for k, mean in enumerate(means)]).sum(0)
        return torch.cat([features.maps[self.base_index], mixed], dim=-1)

    def group_weights(self, features: FeatureMaps, condition: torch.Tensor) -> torch.Tensor:
        """Return the weight of each group for each image; they sum to one.

        Args:
            features: L maps, each (B, N, C), in the precision of the fuser.
            condition: (B, D_c).

        Returns:
            (B, K).
        """
        self._check_maps(features)
        self.check_condition(condition, features.batch_size)
        return self._weights(features, self._group_means(features.maps), condition)

    def layer_shares(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return a half for the base map, and of the other half each group's weight, shared out among its maps.

        Args:
            features: L maps, each (B, N, C).
            condition: (B, D_c).

        Returns:
            (B, L), which sum to one over L.

        Raises:
            ValueError: if maps or condition are not what the fuser was built for.
        """
        self.check_condition(condition, features.batch_size)
        assert condition is not None
        with torch.no_grad():
            weights = self.group_weights(features, condition)
        sizes = torch.tensor(self.group_sizes, device=weights.device)
        shares = (weights / sizes / 2).repeat_interleave(sizes, dim=1)
        shares[:, self.base_index] += 0.5
        return shares

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count the means over the layers of each group, and the weighted sum of the groups."""
        terms = self.num_layers + len(self.group_sizes)
        return 2 * terms * self.num_tokens(grids) * self.in_channels[0]

    def _weights(self, features: FeatureMaps, means: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        if self.keys == "class" and any(prefix.shape[1] for prefix in features.prefix):
            # Of several backbones, some may have no prefix tokens.
            pairs = zip(features.prefix, features.maps, strict=True)
            tokens = self._group_means([first[:, 0] if first.shape[1] else patches.mean(1) for first, patches in pairs])
        else:
            tokens = [mean.mean(1) for mean in means]
        groups = self.key_proj(torch.stack(tokens, dim=1))
        query = self.condition_proj(condition)
        for layer in self.layers:
            query = layer(query, groups)
        weights: torch.Tensor = self.weight_head(query).softmax(-1)
        return weights

    def _group_means(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        ends = list(itertools.accumulate(self.group_sizes))
        return [
            torch.stack(tuple(tensors[end - size : end])).mean(0)
            for size, end in zip(self.group_sizes, ends, strict=True)
        ]


def _group_sizes(groups: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    if isinstance(groups, int):
        if not 1 <= groups <= num_layers:
            raise InputError(
                f"{num_layers} maps cannot be cut into {groups} groups; allowed: 1..{num_layers}. Tap more layers (the "
                "paper taps every block), or give fewer groups."
            )
        size, larger = divmod(num_layers, groups)
        return (size + 1,) * larger + (size,) * (groups - larger)
    sizes = tuple(groups)
    if sum(sizes) != num_layers or min(sizes) < 1:
        raise InputError(
            f"groups {list(sizes)} hold {sum(sizes)} maps, the fuser has {num_layers}; give the number of maps of each "
            "group, at least 1, in the order of the maps."
        )
    return sizes
