"""Locally aware patch features, on which anomaly detection compares images patch by patch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from layerfuse.errors import InputError
from layerfuse.features import CELLS, FeatureMaps, resample_map

__all__ = ["patch_features"]


def patch_features(features: FeatureMaps, neighbourhood: int = 3) -> torch.Tensor:
    """Return PatchCore's patch features (arXiv:2106.08265, section 3.1), (B, sum of C_l, H, W) on the first map's grid.

    Each map is averaged over the neighbourhood of every cell, cells outside of the map counting as zeros as in the
    published code, resampled bilinearly to the grid of the first map, and all are put side by side.

    Args:
        features: L maps, of whatever grids.
        neighbourhood: edge of the square that is averaged, in cells; odd, 1 for the maps as they are.

    Raises:
        ValueError: if the neighbourhood has no middle.
    """
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        raise InputError(f"neighbourhood is {neighbourhood}; give an odd number of cells, such as 3.")
    maps = [features.nchw(index) for index in range(len(features))]
    averaged = [F.avg_pool2d(each, neighbourhood, 1, neighbourhood // 2) for each in maps]
    return torch.cat([resample_map(each, features.grids[0], CELLS) for each in averaged], dim=1)
