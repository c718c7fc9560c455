"""All layers side by side on the channels, as ViP-LLaVA (arXiv:2312.00784) and Hugging Face's LLaVA layer lists do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from layerfuse.errors import InputError
from layerfuse.features import RESAMPLING, FeatureMaps, Grid, as_grid
from layerfuse.fusers.base import FUSERS, Fuser

__all__ = ["Concat"]

_NORMS = ("none", "layer")
_ORDERS = ("blocks", "interleaved")
# Cells that each resampled cell is a weighted sum of.
_CELLS_READ = {"bilinear": 4, "bicubic": 16, "nearest": 0}


@FUSERS.register("concat")
class Concat(Fuser):
    """Concatenate the maps on channels, then optionally normalise and project.

    Args:
        in_channels: C of every map, or one number per map.
        num_layers: number of maps L.
        norm: ``"none"``, or ``"layer"``: LayerNorm over all concatenated channels, as in ViP-LLaVA.
        norm_eps: epsilon of the norm; transformers' VipLlava calls it ``projector_layernorm_eps``.
        order: of the channels. ``"blocks"``: all of the first map, then all of the second. ``"interleaved"``: the first
            channel of every map, then the second, as Llama 3.2 Vision (arXiv:2407.21783) stores its intermediate
            layers; the maps share one width.
        resize: how maps of other grids come to one grid: ``"bilinear"`` as in Eagle (arXiv:2408.15998), ``"bicubic"``
            or ``"nearest"``, see `FeatureMaps.resample`; None refuses maps of several grids.
        grid: (H, W) that the maps are resized to, in patches; if left out, that of the last map.
        out_channels: width of a final linear layer; if left out there is none, and C_out is the sum of the widths.

    Raises:
        ValueError: if norm, order or resize is unknown, maps to interleave differ in width, or ``grid``, ``norm_eps``
            or ``out_channels`` cannot be.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        norm: str = "none",
        norm_eps: float = 1e-5,
        order: str = "blocks",
        resize: str | None = None,
        grid: Sequence[int] | None = None,
        out_channels: int | None = None,
    ) -> None:
        super().__init__(in_channels, num_layers)
        self._check_choice("norm", norm, _NORMS)
        self._check_choice("order", order, _ORDERS)
        if resize is not None:
            self._check_choice("resize", resize, RESAMPLING)
        self._check_positive("norm_eps", norm_eps)
        if out_channels is not None and out_channels < 1:
            raise InputError(f"out_channels is {out_channels}; expected at least 1, or None for no linear layer.")
        if order == "interleaved" and len(set(self.in_channels)) > 1:
            widths = ", ".join(map(str, self.in_channels))
            raise InputError(
                f"fuser 'concat' with order='interleaved' got maps of widths {widths}; it needs one width for all "
                "maps. Tap layers of one width, or give order='blocks'."
            )
        self.order = order
        self.resize = resize
        self.grid = None if grid is None else as_grid(grid, "grid of fuser 'concat'")
        if self.grid is not None and resize is None:
            raise InputError(
                f"grid {list(self.grid)} of fuser 'concat' needs a way to get there; give resize, too: "
                f"{', '.join(RESAMPLING)}."
            )
        self.equal_grids = resize is None
        width = sum(self.in_channels)
        self.out_channels = width if out_channels is None else out_channels
        self.norm: nn.Module = nn.LayerNorm(width, eps=norm_eps) if norm == "layer" else nn.Identity()
        self.proj: nn.Module = nn.Identity() if out_channels is None else nn.Linear(width, out_channels)

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...] | None:
        """Return ViP-LLaVA's layers of CLIP-L (24 blocks): its vision_feature_layers are (-2, -5, -8, -11, 6)."""
        return (23, 20, 17, 14, 6) if depth == 24 else None

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the concatenated map: (B, N, C_out)."""
        if self.resize is not None:
            features = features.resample(self.out_grid(features.grids), self.resize)
        if self.order == "interleaved":
            joined = torch.stack(features.maps, dim=-1).flatten(-2)
        else:
            joined = torch.cat(features.maps, dim=-1)
        fused: torch.Tensor = self.proj(self.norm(joined))
        return fused

    def layer_shares(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the norm of each map's columns in the final linear layer, with the factors of a layer norm.

        Returns:
            (B, L), which sum to one over L; None without a linear layer, where every map is passed on as it is.
        """
        if not isinstance(self.proj, nn.Linear):
            return None
        weight = self.proj.weight.detach()
        if isinstance(self.norm, nn.LayerNorm):
            weight = weight * self.norm.weight.detach()
        if self.order == "interleaved":
            columns = weight.unflatten(1, (-1, self.num_layers)).unbind(2)
        else:
            columns = weight.split(self.in_channels, dim=1)
        sizes = torch.stack([own.norm() for own in columns])
        return (sizes / sizes.sum().clamp_min(1e-12)).expand(features.batch_size, -1)

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        """Return the grid that the maps are resized to: ``grid``, or that of the last map."""
        return self.grid or grids[-1]

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count the weighted sums of the resized maps."""
        if self.resize is None:
            return 0
        target = self.out_grid(grids)
        widths = sum(width for width, grid in zip(self.in_channels, grids, strict=True) if grid != target)
        return 2 * _CELLS_READ[self.resize] * target[0] * target[1] * widths
