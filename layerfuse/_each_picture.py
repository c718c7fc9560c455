"""Pictures of several grids through a fuser: those of equal grids in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import Fuser

__all__ = ["fuse_each"]


def fuse_each(fuser: Fuser, pictures: Sequence[FeatureMaps], condition: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the fused tokens (N_i, C_out) of each picture, in order.

    Args:
        fuser: is called once for each grid.
        pictures: maps of one picture each.
        condition: (B, D_c), one vector for each picture, if the fuser takes one.

    Raises:
        ValueError: if there are not as many conditions as pictures, or the fuser cannot take a grid or a condition.
    """
    if condition is not None and condition.shape[0] != len(pictures):
        raise InputError(f"{len(condition)} conditions were given for {len(pictures)} pictures; give each its own.")
    places: dict[tuple[Grid, ...], list[int]] = {}
    for place, picture in enumerate(pictures):
        places.setdefault(picture.grids, []).append(place)
    tokens: dict[int, torch.Tensor] = {}
    for group in places.values():
        asked = None if condition is None else torch.stack([condition[place] for place in group])
        fused = fuser(FeatureMaps.cat([pictures[place] for place in group]), asked)
        tokens.update(zip(group, fused, strict=True))
    return [tokens[place] for place in range(len(pictures))]
