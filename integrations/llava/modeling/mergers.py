"""Mergers for layer injection: the map of a tapped layer becomes image tokens of the language model's width.

A merger starts as zero: weight and bias of its last linear layer are, until it learns or weights are loaded, so that a
model with new mergers computes what it computed without them.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import nn

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import ExtraTokens, create_fuser, list_fusers
from layerfuse.registry import unknown_name_message

__all__ = ["FuserMLP", "Merger", "PixelShuffleMLP", "create_merger"]


class Merger(nn.Module, abc.ABC):
    """Base class: something, then linear, GELU, and a linear layer that starts at zero.

    Args:
        described: arguments of `create_merger` that build another like this one.
        first: (channels read, channels written) of the first linear layer.
    """

    def __init__(self, described: dict[str, Any], first: tuple[int, int]) -> None:
        super().__init__()
        self.described = described
        self.linear_1 = nn.Linear(*first)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(first[1], described["out_channels"])
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, features: FeatureMaps) -> torch.Tensor:
        """Merge one map (B, H * W, C), or those of a fuser, into (B, N, D) tokens."""
        merged: torch.Tensor = self.linear_2(self.act(self.linear_1(self.gather(features))))
        return merged

    @abc.abstractmethod
    def gather(self, features: FeatureMaps) -> torch.Tensor:
        """Turn maps (B, H * W, C) into N tokens, as wide as the first linear layer reads."""

    @abc.abstractmethod
    def placement(self, grid: Grid) -> tuple[Grid | None, ExtraTokens]:
        """Return the grid on which the tokens of maps of this grid lie, and how many stand in front and behind.

        Raises:
            ValueError: if such maps cannot be merged.
        """

    def num_tokens(self, grid: Grid) -> int:
        """Return the number N of tokens of maps of this grid; errors are those of `placement`."""
        cells, extra = self.placement(grid)
        return (0 if cells is None else math.prod(cells)) + sum(extra)

    def gather_flops(self, grid: Grid) -> int:
        """Count the floating point operations per image before the linear layers."""
        return 0


class FuserMLP(Merger):
    """A fuser, then linear, GELU, linear as in LLaVA-1.5's projector; with `select` over one map the MLP alone."""

    def __init__(self, described: dict[str, Any], fuser: str) -> None:
        gathering = create_fuser(
            fuser,
            in_channels=described["in_channels"],
            num_layers=described["num_layers"],
            options=described["options"],
        )
        if gathering.condition_channels is not None:
            raise InputError(
                f"the fuser {fuser!r} reads a condition, which mergers of layer injection are not given; take 'mlp', "
                "'pixel_shuffle_mlp', or a fuser that reads maps alone."
            )
        super().__init__(described, (gathering.out_channels, described["out_channels"]))
        self.fuser = gathering

    def gather(self, features: FeatureMaps) -> torch.Tensor:
        """Fuse."""
        fused: torch.Tensor = self.fuser(features)
        return fused

    def placement(self, grid: Grid) -> tuple[Grid | None, ExtraTokens]:
        """Return the fuser's."""
        grids = (grid,) * self.fuser.num_layers
        return self.fuser.out_grid(grids), self.fuser.extra_tokens(grids)

    def gather_flops(self, grid: Grid) -> int:
        """Count those of the fuser."""
        return self.fuser.flops((grid,) * self.fuser.num_layers)


class PixelShuffleMLP(Merger):
    """Qwen3-VL's merger: windows of cells side by side on the channels, LayerNorm over them, linear, GELU, linear.

    Source: transformers, models/qwen3_vl, `Qwen3VLVisionPatchMerger` with its norm behind the shuffle.
    """

    def __init__(self, described: dict[str, Any], *, window: int = 2) -> None:
        if not isinstance(window, int) or window < 1:
            raise InputError(
                f"window={window!r} of 'pixel_shuffle_mlp' is no window; give its edge in cells, such as 2."
            )
        wide = described["in_channels"] * window**2
        super().__init__(described, (wide, wide))
        self.window = window
        self.norm = nn.LayerNorm(wide, eps=1e-6)

    def gather(self, features: FeatureMaps) -> torch.Tensor:
        """Shuffle, row by row within a window, and normalise."""
        height, edge = features.grids[0][0], self.window
        wide = rearrange(features[0], "b (h p w q) c -> b (h w) (p q c)", h=height // edge, p=edge, q=edge)
        normed: torch.Tensor = self.norm(wide)
        return normed

    def placement(self, grid: Grid) -> tuple[Grid | None, ExtraTokens]:
        """Return the grid of the windows."""
        height, width = grid
        if height % self.window or width % self.window:
            raise InputError(
                f"merger 'pixel_shuffle_mlp' cannot cut a grid of {height}x{width} into windows of {self.window}x"
                f"{self.window}; set its option window to a common divisor, or take another image size."
            )
        return (height // self.window, width // self.window), ExtraTokens()


def create_merger(
    name: str,
    *,
    in_channels: int | list[int],
    out_channels: int,
    num_layers: int = 1,
    options: Mapping[str, Any] | None = None,
) -> Merger:
    """Build a merger.

    Args:
        name: `mlp`, `pixel_shuffle_mlp`, or a fuser's name: that fuser with an MLP behind it.
        in_channels: width C of the maps; or the width of each, for a fuser.
        out_channels: width D of the language model.
        num_layers: number of maps L; only a fuser takes more than one.
        options: `window` of `pixel_shuffle_mlp` (2), or the fuser's own.

    Raises:
        ValueError: if the name or an option is unknown, or there are more maps than the merger takes.
    """
    given = dict(options or {})
    described: dict[str, Any] = {"name": name, "in_channels": in_channels, "out_channels": out_channels}
    described |= {"num_layers": num_layers, "options": given}
    if name not in (*_OPTIONS, *list_fusers()):
        raise InputError(unknown_name_message("merger", name, (*_OPTIONS, *list_fusers())))
    if name not in _OPTIONS:
        return FuserMLP(described, name)
    if unknown := sorted(given.keys() - set(_OPTIONS[name])):
        raise InputError(unknown_name_message(f"option of merger {name!r}", unknown[0], _OPTIONS[name]))
    if num_layers > 1:
        raise InputError(f"merger {name!r} takes one layer and is given {num_layers}; name a fuser as the merger.")
    return FuserMLP(described, "select") if name == "mlp" else PixelShuffleMLP(described, **given)


# Mergers that are no fusers -> their options.
_OPTIONS: Mapping[str, tuple[str, ...]] = {"mlp": (), "pixel_shuffle_mlp": ("window",)}
