"""All layers one after the other along the tokens: the sequence append that Eagle (arXiv:2408.15998) compares with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, ExtraTokens, Fuser

__all__ = ["TokenConcat"]


@FUSERS.register("token_concat")
class TokenConcat(Fuser):
    """Concatenate the maps along the tokens, in the order given; no parameters. Their grids may differ.

    The query map's tokens lie on the grid of the result; those of the maps before and behind it count as
    ``extra_tokens`` in front and behind.

    Args:
        in_channels: C of every map; they share one width.
        num_layers: number of maps L.
        query_index: position of the query map among the L; negative counts from the end.

    Raises:
        ValueError: if there is no such query map.
    """

    equal_grids = False
    equal_channels = True

    def __init__(self, in_channels: int | Sequence[int], num_layers: int, *, query_index: int = -1) -> None:
        super().__init__(in_channels, num_layers)
        self._check_index("query_index", query_index)
        self.query_index = query_index % num_layers

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tokens of all maps: (B, S, C), with S the sum of their N."""
        return torch.cat(features.maps, dim=1)

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        """Return the query map's grid."""
        return grids[self.query_index]

    def extra_tokens(self, grids: Sequence[Grid]) -> ExtraTokens:
        """Return the numbers of tokens of the maps before and behind the query map."""
        sizes = [height * width for height, width in grids]
        return ExtraTokens(front=sum(sizes[: self.query_index]), behind=sum(sizes[self.query_index + 1 :]))
