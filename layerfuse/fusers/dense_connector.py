"""Dense Connector (arXiv:2405.13800, HJYao00/DenseConnector): the query layer, and all others beside it.

With q the query map, f_1 ... f_K the others, and [ ] concatenation:

    sparse token integration (STI)      [q, pool(f_1), ..., pool(f_K)]      along the tokens
    sparse channel integration (SCI)    [q, f_1, ..., f_K]                  along the channels
    dense channel integration (DCI)     [q, mean(run 1), ..., mean(run G)]  along the channels

DCI cuts the layers, in their order, into G runs of equal length. For CLIP-L the published code averages states 0..11
and 12..23, with q = 23 among the latter; for SigLIP-so400m 0..12 and 13..25, with q = 26 in neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.base import FUSERS, ExtraTokens, Fuser, all_but

__all__ = ["DenseConnector"]

_T = TypeVar("_T")

_MODES = ("sti", "sci", "dci")
_SPARSE_LAYERS = {24: (7, 15, 23), 27: (7, 15, 26)}


@FUSERS.register("dense_connector")
class DenseConnector(Fuser):
    """Put the query map beside the others: pooled as extra tokens, whole, or averaged in groups. No parameters.

    Args:
        in_channels: C of every map; they share one width.
        num_layers: number of maps L.
        mode: ``"sti"`` (sparse token integration: the pooled cells of the other maps stand behind the query map's
            tokens), ``"sci"`` (sparse channel integration: the other maps whole) or ``"dci"`` (dense channel
            integration: the means of ``groups`` runs of maps).
        groups: of ``"dci"``, number of runs. They are equally long where the number of maps allows, else differ by one.
        query_in_groups: of ``"dci"``, whether the query map is also in its run, as for CLIP, or in none, as for
            SigLIP. If left out, it is where that makes the runs equal (24 maps in 2 groups), and is not otherwise (27).
        pool: of ``"sti"``, cells that become one token: a number, neighbours along the raster as published, across row
            ends; or a pair, windows of (rows, columns). Cells that fill no pool at the end are left out.
        query_index: position of the query map among the L; negative counts from the end.

    Raises:
        ValueError: if the mode is unknown, there is no such query map, there are fewer maps than groups, or ``groups``
            or ``pool`` cannot be.
    """

    equal_channels = True

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        mode: str = "dci",
        groups: int = 2,
        query_in_groups: bool | None = None,
        pool: int | Sequence[int] = 8,
        query_index: int = -1,
    ) -> None:
        super().__init__(in_channels, num_layers)
        self._check_choice("mode", mode, _MODES)
        self._check_index("query_index", query_index)
        self._check_count("groups", groups)
        window = (pool,) if isinstance(pool, int) else tuple(pool)
        if len(window) not in (1, 2) or min(window) < 1:
            raise InputError(
                f"pool of fuser 'dense_connector' is {pool}; give a number of cells along the raster, or (rows, "
                "columns), all at least 1."
            )
        self.mode = mode
        self.groups = groups
        self.query_in_groups = num_layers % groups == 0 if query_in_groups is None else query_in_groups
        self.pool = window
        self.query_index = query_index % num_layers
        self.equal_grids = mode != "sti"
        if mode == "dci":
            grouped = num_layers - (not self.query_in_groups)
            if grouped < groups:
                raise InputError(
                    f"fuser 'dense_connector' got num_layers={num_layers}, which leaves {grouped} maps for "
                    f"groups={groups}; each needs one. Tap more layers, give fewer groups, or use 'select' for one map."
                )
        self.out_channels = self.in_channels[0] * {"sti": 1, "sci": num_layers, "dci": 1 + groups}[mode]

    @classmethod
    def default_layers(cls, depth: int, *, mode: str = "dci") -> tuple[int, ...] | None:
        """Return the layers that the published code taps, the query last.

        Args:
            depth: number of the backbone's blocks.
            mode: as in the constructor; ``"sti"`` and ``"sci"`` tap few layers, ``"dci"`` all.

        Returns:
            For ``"dci"`` and any depth all layers from the embeddings to the penultimate block, as published for CLIP-L
            (24 blocks) and SigLIP-so400m (27); for the others three layers of these two, None for other depths.

        Raises:
            ValueError: if the mode is unknown.
        """
        cls._check_choice("mode", mode, _MODES)
        return tuple(range(depth)) if mode == "dci" else _SPARSE_LAYERS.get(depth)

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the query map and the others: (B, N, C_out)."""
        query = features.maps[self.query_index]
        if self.mode == "dci":
            return torch.cat([query, *(torch.stack(run).mean(0) for run in self._runs(features.maps))], dim=-1)
        others = all_but(features.maps, self.query_index)
        if self.mode == "sci":
            return torch.cat([query, *others], dim=-1)
        grids = all_but(features.grids, self.query_index)
        return torch.cat([query, *(self._pooled(*pair) for pair in zip(others, grids, strict=True))], dim=1)

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        """Return the query map's grid."""
        return grids[self.query_index]

    def extra_tokens(self, grids: Sequence[Grid]) -> ExtraTokens:
        """Return the number of pooled tokens, behind the grid; none but in ``"sti"``."""
        if self.mode != "sti":
            return ExtraTokens()
        return ExtraTokens(behind=sum(self._num_pooled(grid) for grid in all_but(grids, self.query_index)))

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count one multiply-add for each number that is averaged."""
        if self.mode == "sci":
            return 0
        if self.mode == "dci":
            height, width = self.out_grid(grids)
            cells = height * width * sum(map(len, self._runs(grids)))
        else:
            cells = sum(self.extra_tokens(grids)) * self.pool[0] * self.pool[-1] ** (len(self.pool) - 1)
        return 2 * cells * self.in_channels[0]

    def _runs(self, items: Sequence[_T]) -> list[list[_T]]:
        """Return the items of the maps of each group."""
        grouped = list(items) if self.query_in_groups else all_but(items, self.query_index)
        ends = [len(grouped) * group // self.groups for group in range(self.groups + 1)]
        return [grouped[start:end] for start, end in pairwise(ends)]

    def _num_pooled(self, grid: Grid) -> int:
        height, width = grid
        if len(self.pool) == 1:
            return height * width // self.pool[0]
        return (height // self.pool[0]) * (width // self.pool[1])

    def _pooled(self, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Return (B, N, C) tokens averaged over pools of cells; none at all if the map is smaller than a pool."""
        if len(self.pool) == 1:
            count = self._num_pooled(grid)
            return tokens[:, : count * self.pool[0]].unflatten(1, (count, self.pool[0])).mean(2)
        (rows, columns), (height, width) = self.pool, (grid[0] // self.pool[0], grid[1] // self.pool[1])
        whole = tokens.unflatten(1, grid)[:, : height * rows, : width * columns]
        return whole.unflatten(2, (width, columns)).unflatten(1, (height, rows)).mean((2, 4)).flatten(1, 2)
