"""The one value that travels between the parts of layerfuse: feature maps that carry their own geometry.

Shape legend, valid in the whole library:

======  =====================================================================
letter  meaning
======  =====================================================================
B       batch size, in images
L       number of tapped layers (maps)
H, W    height and width of a patch grid, in patches; ``grid = (H, W)``
N       number of patch tokens of a map, ``N = H * W``, row-major over the grid
P       number of prefix tokens (class token, registers)
C       channels of a map (the backbone's ``embed_dim``)
D       width of the language model
Q       number of query tokens
M       number of attention heads
K       number of sampling points per head and level
S       sum of N over the maps that are attended to
======  =====================================================================

Layer numbers follow Hugging Face ``hidden_states``: ``0`` is the embedding output that enters block 1, ``k`` the output
of block ``k`` before any final norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from layerfuse.errors import InputError, UnknownKeyError

__all__ = ["FeatureMaps", "Grid"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class FeatureMaps:
    """Maps of L tapped layers, in the order they were asked for.

    Args:
        maps: L tensors, each (B, N_l, C_l): patch tokens, row-major over their grid, prefix tokens split off.
        layers: L layer numbers, counted from 0 = embedding output; never negative.
        grids: L pairs (H_l, W_l), in patches.
        prefix: L tensors, each (B, P, C_l), or empty if the backbone has no prefix tokens.

    Raises:
        ValueError: if the fields disagree with one another.
    """

    maps: tuple[torch.Tensor, ...]
    layers: tuple[int, ...]
    grids: tuple[Grid, ...]
    prefix: tuple[torch.Tensor, ...] = ()

    def __post_init__(self) -> None:
        """Check that the fields fit one another."""
        count = len(self.maps)
        if count == 0:
            raise InputError("FeatureMaps needs at least one map, got none; tap at least one layer.")
        if len(self.layers) != count or len(self.grids) != count or len(self.prefix) not in (0, count):
            raise InputError(
                f"FeatureMaps got {count} maps, {len(self.layers)} layers, {len(self.grids)} grids and "
                f"{len(self.prefix)} prefix tensors; give one layer and one grid per map, and either one prefix "
                "tensor per map or none."
            )
        batch_size = self.maps[0].shape[0]
        for layer, grid, feature_map in zip(self.layers, self.grids, self.maps, strict=True):
            if feature_map.ndim != 3:
                raise InputError(
                    f"the map of layer {layer} has shape {tuple(feature_map.shape)}; expected three dimensions "
                    "(B, N, C): flatten the grid row by row and move channels last."
                )
            height, width = grid
            if feature_map.shape[1] != height * width:
                raise InputError(
                    f"the map of layer {layer} has {feature_map.shape[1]} tokens, but its grid {height}x{width} has "
                    f"{height * width}; split the prefix tokens off and give the grid as (H, W) in patches."
                )
            if feature_map.shape[0] != batch_size:
                raise InputError(
                    f"the map of layer {layer} has batch size {feature_map.shape[0]}, the first map has {batch_size}; "
                    "all maps must come from the same images."
                )

    def __len__(self) -> int:
        """Number of maps, L."""
        return len(self.maps)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Iterate over the L maps, each (B, N_l, C_l)."""
        return iter(self.maps)

    @property
    def batch_size(self) -> int:
        """B, in images."""
        return self.maps[0].shape[0]

    @property
    def channels(self) -> tuple[int, ...]:
        """Width C_l of each map."""
        return tuple(feature_map.shape[-1] for feature_map in self.maps)

    def layer(self, number: int) -> torch.Tensor:
        """Return the map of one layer.

        Args:
            number: a layer number from ``layers``.

        Returns:
            (B, N, C) map of that layer.

        Raises:
            KeyError: if that layer was not tapped.
        """
        if number not in self.layers:
            raise UnknownKeyError(f"layer {number} was not tapped; tapped layers: {', '.join(map(str, self.layers))}.")
        return self.maps[self.layers.index(number)]

    def spatial(self, index: int) -> torch.Tensor:
        """Return one map with its grid unfolded, as a view where memory allows.

        Args:
            index: position among the L maps (negative counts from the end).

        Returns:
            (B, C, H, W) map.
        """
        height, width = self.grids[index]
        return self.maps[index].transpose(1, 2).unflatten(2, (height, width))
