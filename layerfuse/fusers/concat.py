"""All layers side by side on the channels, as ViP-LLaVA (arXiv:2312.00784) and Hugging Face's LLaVA layer lists do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps
from layerfuse.fusers.base import FUSERS, Fuser

__all__ = ["Concat"]

_NORMS = ("none", "layer")


@FUSERS.register("concat")
class Concat(Fuser):
    """Concatenate the maps on channels, then optionally normalise and project. All maps share one grid.

    Args:
        in_channels: C of every map, or one number per map.
        num_layers: number of maps L.
        norm: ``"none"``, or ``"layer"``: LayerNorm over all concatenated channels, as in ViP-LLaVA.
        out_channels: width of a final linear layer; if left out there is none, and C_out is the sum of the widths.

    Raises:
        ValueError: if the norm is unknown or ``out_channels`` below 1.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        norm: str = "none",
        out_channels: int | None = None,
    ) -> None:
        super().__init__(in_channels, num_layers)
        if norm not in _NORMS:
            raise InputError(f"norm {norm!r} of fuser 'concat' is unknown. Known: {', '.join(_NORMS)}.")
        if out_channels is not None and out_channels < 1:
            raise InputError(f"out_channels is {out_channels}; expected at least 1, or None for no linear layer.")
        width = sum(self.in_channels)
        self.out_channels = width if out_channels is None else out_channels
        self.norm: nn.Module = nn.LayerNorm(width) if norm == "layer" else nn.Identity()
        self.proj: nn.Module = nn.Identity() if out_channels is None else nn.Linear(width, out_channels)

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...] | None:
        """Return ViP-LLaVA's layers of CLIP-L (24 blocks): its vision_feature_layers are (-2, -5, -8, -11, 6)."""
        return (23, 20, 17, 14, 6) if depth == 24 else None

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the concatenated map: (B, N, C_out)."""
        fused: torch.Tensor = self.proj(self.norm(torch.cat(features.maps, dim=-1)))
        return fused
