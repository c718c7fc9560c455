"""Feature maps of a batch's images: encoded, or taken from a cache, or some of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps

from .parts import learns

__all__ = ["image_maps"]


def image_maps(
    tower: Any,
    pixels: torch.Tensor | None = None,
    cached: FeatureMaps | None = None,
    uncached: Sequence[bool] | None = None,
) -> FeatureMaps:
    """Encode tiles, and put them among those whose maps are there already; a frozen backbone builds no graph.

    Args:
        tower: the model's `LayerfuseVisionModel`.
        pixels: (tiles, C, height, width) of the tiles that have no maps, prepared, or uint8, which the backbone's
            preprocessing normalises here, on their device; None only if all have maps.
        cached: maps of the others, as the same tower computed them; None if there are none.
        uncached: for each tile, True where its pixels are given; needed if there are pixels and maps. Numbers of the
            host, so that it does not wait for a GPU.

    Raises:
        ValueError: if there are both, and `uncached` does not say which is which.
    """
    if cached is not None:
        if not torch.is_autocast_enabled(cached[0].device.type):
            # The tower's maps have its own type then; those of a cache may have been stored in another.
            cached = cached.to(next(tower.parameters()).dtype)
        if pixels is None:
            return cached
    assert pixels is not None
    if pixels.dtype == torch.uint8:
        pixels = tower.backbone.preprocessing.normalize(pixels)
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns(tower)):
        encoded: FeatureMaps = tower(pixels.to(next(tower.parameters()).dtype))
    return encoded if cached is None else _merged(encoded, cached, uncached)


def _merged(encoded: FeatureMaps, cached: FeatureMaps, uncached: Sequence[bool] | None) -> FeatureMaps:
    counts = (encoded.batch_size, cached.batch_size)
    if uncached is None or (len(uncached), sum(uncached)) != (sum(counts), counts[0]):
        raise InputError(
            f"pixel_values are of {counts[0]} tiles and feature_maps of {counts[1]} others; give uncached, "
            f"{sum(counts)} booleans, True where a tile is one of the former."
        )

    def merge(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        new, old = iter(first.split(1)), iter(second.to(first.dtype).split(1))
        return torch.cat([next(new if own else old) for own in uncached])

    maps = tuple(merge(*tokens) for tokens in zip(encoded.maps, cached.maps, strict=True))
    prefix = tuple(merge(*tokens) for tokens in zip(encoded.prefix, cached.prefix, strict=True))
    return replace(encoded, maps=maps, prefix=prefix)
