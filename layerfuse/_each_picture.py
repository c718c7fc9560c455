"""Pictures of several grids through a fuser: those of equal grids in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
        ValueError: as `Fuser.check_condition` for all pictures, or if the fuser cannot take a grid.
    """
    fuser.check_condition(condition, len(pictures))
    places: dict[tuple[Grid, ...], list[int]] = {}
    for place, picture in enumerate(pictures):
        places.setdefault(picture.grids, []).append(place)
    tokens: dict[int, torch.Tensor] = {}
    for group in places.values():
        asked = None if condition is None else torch.stack([condition[place] for place in group])
        fused = fuser(FeatureMaps.cat([pictures[place] for place in group]), asked)
        tokens.update(zip(group, fused, strict=True))
    return [tokens[place] for place in range(len(pictures))]
