"""Feature pyramids: maps of a Vision Transformer, of one stride or of several, brought to strides 4, 8, 16 and 32.

`FeaturePyramid` is ViTDet's simple feature pyramid (arXiv:2203.16527, section 3), `resample_pyramid` does it without
parameters, and `PyramidEncoder` puts either behind a backbone or an encoder.

The level of stride s has ceil(height / s) × ceil(width / s) cells of an image of that height and width, whatever the
patch size: where a map comes out with others, as with patches of 14 pixels, it is resampled bilinearly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerfuse.backbones import AnyBackbone
from layerfuse.backbones.base import as_pair
from layerfuse.encoder import FusedEncoder
from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.features import CELLS, Grid, resample_map

__all__ = ["STRIDES", "FeaturePyramid", "PyramidEncoder", "resample_pyramid"]

STRIDES = (4, 8, 16, 32)
"""Strides, in pixels, that decoders and detectors expect."""

Maps = torch.Tensor | Sequence[torch.Tensor]


class FeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid: each level from the map on its own, by deconvolutions or max pooling.

    As published for patches of 16 pixels. Stride 4: a 2×2 deconvolution of stride 2 that halves the channels,
    LayerNorm, GELU, another such deconvolution. Stride 8: one. Stride 16: the map as it is. Stride 32: 2×2 max pooling.
    On each level a 1×1 convolution to ``out_channels`` and LayerNorm, a 3×3 convolution and LayerNorm, no biases;
    LayerNorm is over the channels of a cell. Other patch sizes take the number of doublings or halvings that comes
    nearest, then the level is resampled: patches of 14 pixels at stride 4, for example, two deconvolutions, which give
    stride 3.5.

    Args:
        in_channels: of the map, or one number for each level if each has a map of its own.
        out_channels: of every level; ViTDet has 256.
        patch_size: pixels of a cell of the maps: one edge, or (height, width); or such a pair for each level, as
            `AnyBackbone.strides` gives them, where each level has a map of its own.
        strides: of the levels, in pixels, from fine to coarse.

    Raises:
        ValueError: if strides, channels or patch sizes are not possible.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        *,
        patch_size: int | Sequence[int] | Sequence[Sequence[int]] = 16,
        strides: Sequence[int] = STRIDES,
    ) -> None:
        super().__init__()
        self.strides = _as_strides(strides)
        self.out_channels = out_channels
        widths = [in_channels] * len(self.strides) if isinstance(in_channels, int) else list(in_channels)
        if len(widths) != len(self.strides):
            raise InputError(
                f"in_channels are {len(widths)} numbers for {len(self.strides)} strides {self.strides}; give one "
                "number, or one for each level."
            )
        edges = [math.sqrt(math.prod(cell)) for cell in _each_cell(patch_size, self.strides)]
        doublings = [round(math.log2(edge / stride)) for edge, stride in zip(edges, self.strides, strict=True)]
        self.scale = nn.ModuleList(_scaling(width, count) for width, count in zip(widths, doublings, strict=True))
        scaled = [max(1, width >> max(0, count)) for width, count in zip(widths, doublings, strict=True)]
        self.project = nn.ModuleList(_projection(width, out_channels) for width in scaled)

    def forward(self, maps: Maps, image_size: int | Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return one map for each stride, (B, out_channels, ceil(height / stride), ceil(width / stride)).

        Args:
            maps: one (B, C, H, W) from which every level is made, as ViTDet does it with the last one; or one for each
                level, as `Backbone.maps` gives those of as many layers.
            image_size: of the images in pixels: one edge, or (height, width).

        Raises:
            ValueError: if the number of maps is neither 1 nor that of the levels.
        """
        size, given = as_pair(image_size), _each_level(maps, self.strides)
        levels = []
        for stride, level, scale, project in zip(self.strides, given, self.scale, self.project, strict=True):
            levels.append(project(resample_map(scale(level), _cells(size, stride), CELLS)))
        return tuple(levels)


def resample_pyramid(
    maps: Maps, image_size: int | Sequence[int], *, strides: Sequence[int] = STRIDES
) -> tuple[torch.Tensor, ...]:
    """Return one map for each stride, (B, C, ceil(height / stride), ceil(width / stride)), without parameters.

    Maps are resampled bilinearly, cells over the pixels that they cover. Arguments are those of
    `FeaturePyramid.forward`, and ``strides`` in pixels, from fine to coarse.

    Raises:
        ValueError: if the number of maps is neither 1 nor that of the strides, or the strides are none.
    """
    size, levels = as_pair(image_size), _as_strides(strides)
    given = _each_level(maps, levels)
    return tuple(
        [resample_map(level, _cells(size, stride), CELLS) for stride, level in zip(levels, given, strict=True)]
    )


class PyramidEncoder(nn.Module):
    """Images in, a pyramid of maps out: what decoders and detectors read.

    Args:
        encoder: a backbone, whose maps are the levels, one for all or one for each stride, in the order of its layers;
            or a `FusedEncoder`, whose fused map makes all levels. Frozen with ``freeze()`` or ``freeze_backbone()``, it
            stays so.
        strides: of the levels, in pixels, from fine to coarse.
        out_channels: of every level, by a `FeaturePyramid`; None for `resample_pyramid`, which keeps the maps' own.

    Attributes:
        channels: of each level.

    Raises:
        ValueError: if the backbone taps another number of layers, or the fused tokens lie on no grid.
        TypeError: if ``encoder`` is neither backbone nor encoder.
    """

    def __init__(
        self,
        encoder: AnyBackbone | FusedEncoder,
        *,
        strides: Sequence[int] = STRIDES,
        out_channels: int | None = 256,
    ) -> None:
        super().__init__()
        self.strides = _as_strides(strides)
        widths, cells = _facts(encoder)
        if len(widths) not in (1, len(self.strides)):
            raise InputError(
                f"the backbone taps {len(widths)} layers for {len(self.strides)} strides {self.strides}; tap one layer "
                "for all of them, or one for each, or fuse the layers: create_encoder(…, fuser='mmfuser')."
            )
        self.encoder = encoder
        widths = widths * len(self.strides) if len(widths) == 1 else widths
        self.channels = widths if out_channels is None else (out_channels,) * len(self.strides)
        cells = cells * len(self.strides) if len(cells) == 1 else cells
        self.pyramid = (
            None
            if out_channels is None
            else FeaturePyramid(widths, out_channels, patch_size=cells, strides=self.strides)
        )

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return _backbone(self.encoder).in_channels

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one map for each stride, (B, C, ceil(height / stride), ceil(width / stride)).

        Args:
            images: (B, channels, height, width), as the encoder takes them.

        Raises:
            ValueError: if the encoder cannot take them.
        """
        maps: Maps = self.encoder.maps(images)
        size = tuple(images.shape[2:])
        if self.pyramid is None:
            return resample_pyramid(maps, size, strides=self.strides)
        levels: tuple[torch.Tensor, ...] = self.pyramid(maps, size)
        return levels


def _backbone(encoder: AnyBackbone | FusedEncoder) -> AnyBackbone:
    return encoder.backbone if isinstance(encoder, FusedEncoder) else encoder


def _facts(encoder: AnyBackbone | FusedEncoder) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Return the width of each map, and the pixels (height, width) of its cells."""
    if isinstance(encoder, AnyBackbone):
        return encoder.map_channels, encoder.strides
    if not isinstance(encoder, FusedEncoder):
        raise InvalidTypeError(
            f"encoder is a {type(encoder).__name__}; give a backbone (create_backbone) or a FusedEncoder "
            "(create_encoder)."
        )
    grid = encoder.grid()
    if grid is None:
        raise InputError(
            f"the tokens of fuser {encoder.fuser.name!r} lie on no grid, so they make no pyramid; take a fuser that "
            "keeps the grid, such as 'mmfuser' or 'concat', or give encoder.backbone."
        )
    # Pixels a cell in fact: the fuser may have chosen any grid, and a rest of the image may lie in no patch.
    height, width = encoder.backbone.image_size
    return (encoder.out_channels,), ((max(1, round(height / grid[0])), max(1, round(width / grid[1]))),)


def _each_cell(patch_size: Any, strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the (height, width) of a cell of each level's map, in pixels."""
    if isinstance(patch_size, int) or all(isinstance(edge, int) for edge in patch_size):
        return [as_pair(patch_size)] * len(strides)
    if len(patch_size) != len(strides):
        raise InputError(
            f"patch_size has {len(patch_size)} pairs for {len(strides)} strides {strides}; give one edge, one (height, "
            "width), or such a pair for each level."
        )
    return [as_pair(cell) for cell in patch_size]


def _as_strides(strides: Sequence[int]) -> tuple[int, ...]:
    given = tuple(strides)
    whole = all(isinstance(stride, int) and stride >= 1 for stride in given)
    if not given or not whole or list(given) != sorted(given):
        raise InputError(f"strides are {given}; give whole numbers of pixels, from fine to coarse, such as {STRIDES}.")
    return given


def _each_level(maps: Maps, strides: tuple[int, ...]) -> list[torch.Tensor]:
    given = [maps] if isinstance(maps, torch.Tensor) else list(maps)
    if len(given) not in (1, len(strides)):
        raise InputError(
            f"a pyramid of strides {strides} was given {len(given)} maps; give one for all levels, or one for each."
        )
    return given * len(strides) if len(given) == 1 else given


def _cells(size: tuple[int, int], stride: int) -> Grid:
    return -(-size[0] // stride), -(-size[1] // stride)


def _scaling(width: int, doublings: int) -> nn.Sequential:
    """Deconvolutions that double a map so many times, or poolings that halve it if the number is negative."""
    layers: list[nn.Module] = [nn.MaxPool2d(2, 2, ceil_mode=True) for _ in range(-doublings)]
    for step in range(doublings):
        narrower = max(1, width >> 1)
        layers += [_ChannelNorm(width, eps=1e-6), nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(width, narrower, 2, 2))
        width = narrower
    return nn.Sequential(*layers)


def _projection(width: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, out_channels, 1, bias=False),
        _ChannelNorm(out_channels, eps=1e-6),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        _ChannelNorm(out_channels, eps=1e-6),
    )


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell of a map (B, C, H, W)."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image.movedim(1, -1)).movedim(-1, 1)
