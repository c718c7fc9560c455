"""MMFuser (arXiv:2410.11829, section 3): the deep map asks the shallow ones for detail, by deformable attention.

With q the query map, f_1 ... f_{L-1} the others, LN layer norms, and g1, g2 learned scales per channel:

    a   = cross_attention(LN_q(q), LN_f([f_1, ..., f_{L-1}]))
    out = q + g1 * (a + g2 * self_attention(LN_1(a)))

g1 = g2 = 0 at the start, so that a new block is the identity on its query map: it starts as LLaVA-1.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, Fuser, all_but
from layerfuse.ops import ChannelScale, MultiScaleDeformableAttention

__all__ = ["MMFuser", "from_published_state_dict", "to_published_state_dict"]

_T = TypeVar("_T")

_PUBLISHED_SCALES = {"gamma1": "output_scale.scale", "gamma2": "self_scale.scale"}


@FUSERS.register("mmfuser")
class MMFuser(Fuser):
    """Enrich one map with details that deformable cross-attention finds in the others. Their grids may differ.

    Args:
        in_channels: C of every map; they share one width.
        num_layers: number of maps L, at least 2: one query, L - 1 levels of values, in the order given.
        num_heads: M; must divide C.
        num_points: K, sampling points per head and level.
        query_index: position of the query map among the L; negative counts from the end.
        norm_eps: epsilon of the three layer norms.
        implementation: path of the deformable attention, one of `layerfuse.ops.IMPLEMENTATIONS`; not saved. See
            `layerfuse.ops.set_implementation`.

    Raises:
        ValueError: if there is no value map, no such query map, ``norm_eps`` is not above 0, or the heads do not divide
            the channels.
    """

    equal_grids = False
    equal_channels = True
    unsaved_options = frozenset({"implementation"})

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        num_heads: int = 16,
        num_points: int = 4,
        query_index: int = -1,
        norm_eps: float = 1e-6,
        implementation: str = "auto",
    ) -> None:
        super().__init__(in_channels, num_layers)
        if num_layers < 2:
            raise InputError(
                f"fuser 'mmfuser' got num_layers={num_layers}; it needs at least 2, one query map and one value map. "
                "For a single map use 'select'."
            )
        self._check_index("query_index", query_index)
        self._check_positive("norm_eps", norm_eps)
        channels = self.in_channels[0]
        self.query_index = query_index % num_layers
        self.query_norm = nn.LayerNorm(channels, eps=norm_eps)
        self.feat_norm = nn.LayerNorm(channels, eps=norm_eps)
        self.cross_attn = MultiScaleDeformableAttention(
            channels,
            num_heads=num_heads,
            num_levels=num_layers - 1,
            num_points=num_points,
            implementation=implementation,
        )
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.self_attn = MultiScaleDeformableAttention(
            channels, num_heads=num_heads, num_points=num_points, implementation=implementation
        )
        self.self_scale = ChannelScale(channels)
        self.output_scale = ChannelScale(channels)

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...] | None:
        """Return the five layers that the paper taps of CLIP-L (24 blocks), the query last."""
        return (3, 8, 13, 18, 23) if depth == 24 else None

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Enrich the query map: (B, N, C) on the query map's grid."""
        query, query_grid = features.maps[self.query_index], features.grids[self.query_index]
        values = torch.cat(all_but(features.maps, self.query_index), dim=1)
        grids = all_but(features.grids, self.query_index)
        attended = self.cross_attn(self.query_norm(query), query_grid, self.feat_norm(values), grids)
        inner = self.norm1(attended)
        refined = attended + self.self_scale(self.self_attn(inner, query_grid, inner, (query_grid,)))
        fused: torch.Tensor = query + self.output_scale(refined)
        return fused

    def sampling_points(self, features: FeatureMaps) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where each cell of the query map reads the other maps, and how much each place counts.

        Args:
            features: L maps, as in ``forward``.

        Returns:
            (B, N, M, L - 1, K, 2) places (x, y), where 0 and 1 are the outer edges of the map, and
            (B, N, M, L - 1, K) weights; without gradient.

        Raises:
            ValueError: if number or widths of the maps are not what the fuser was built for.
        """
        self._check_maps(features)
        query = features.maps[self.query_index].to(self.query_norm.weight.dtype)
        grids = all_but(features.grids, self.query_index)
        with torch.no_grad():
            return self.cross_attn.sampling_points(self.query_norm(query), features.grids[self.query_index], grids)

    def layer_shares(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the query map's 1 and, for the others, the mean size of g1 times their attention, made shares.

        As if all maps had tokens of one length, and the projections kept it.

        Returns:
            (B, L, H, W) on the query map's grid; they sum to one over L.

        Raises:
            ValueError: if number or widths of the maps are not what the fuser was built for.
        """
        _, weights = self.sampling_points(features)
        scale = self.output_scale.scale.detach().abs().mean()
        levels = weights.sum(-1).mean(2).transpose(1, 2) * scale  # (B, L - 1, N)
        before, behind = levels[:, : self.query_index], levels[:, self.query_index :]
        sizes = torch.cat([before, torch.ones_like(levels[:, :1]), behind], dim=1)
        return (sizes / sizes.sum(1, keepdim=True)).unflatten(-1, features.grids[self.query_index])

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        """Return the query map's grid."""
        return grids[self.query_index]

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count the operations of the sampling, in both attentions."""
        num_queries = self.num_tokens(grids)
        return self.cross_attn.sampling_flops(num_queries) + self.self_attn.sampling_flops(num_queries)


def from_published_state_dict(state_dict: Mapping[str, _T]) -> dict[str, _T]:
    """Rename the weights of a published MMFuser block (``MSCrossAttnBlock``) to those of ``MMFuser``.

    Any outer prefix has been removed. The weights are passed on, never looked into.

    Raises:
        ValueError: if gamma1 or gamma2 is absent or was renamed, or other names are missing or unknown.
    """
    absent = [name for name in _PUBLISHED_SCALES if name not in state_dict]
    renamed = [name for name in absent if name.replace("gamma", "weight") in state_dict]
    if absent:
        found = f" (found instead: {', '.join(name.replace('gamma', 'weight') for name in renamed)})" if renamed else ""
        raise InputError(
            f"the published weights lack {', '.join(absent)}{found}; without them the block would be the identity. Old "
            "versions of transformers rename these parameters while loading ('gamma' becomes 'weight') and drop them; "
            "what is saved afterwards has lost them. Take the files that the training wrote, and read them themselves; "
            "if you know that nothing but the names changed, rename them back."
        )
    return _renamed(state_dict, _published_names(), "one published block: remove any outer prefix")


def to_published_state_dict(state_dict: Mapping[str, _T]) -> dict[str, _T]:
    """Rename the weights of ``MMFuser``, with the published settings, to those of the published block.

    It undoes `from_published_state_dict`.

    Raises:
        ValueError: if names are missing or unknown.
    """
    return _renamed(state_dict, {ours: published for published, ours in _published_names().items()}, "one MMFuser")


def _renamed(state_dict: Mapping[str, _T], names: Mapping[str, str], whose: str) -> dict[str, _T]:
    missing, unknown = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unknown:
        raise InputError(
            f"these are not the weights of {whose}: missing {', '.join(missing) or 'none'}; unknown "
            f"{', '.join(unknown) or 'none'}. Leave other modules out."
        )
    return {name: state_dict[given] for given, name in names.items()}


def _published_names() -> dict[str, str]:
    """Return a dictionary from published names to ours."""
    norms = ("query_norm", "feat_norm", "norm1")
    projections = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    modules = [
        *norms,
        *(f"{attention}.{name}" for attention in ("cross_attn", "self_attn") for name in projections),
    ]
    same = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    return {**_PUBLISHED_SCALES, **{name: name for name in same}}
