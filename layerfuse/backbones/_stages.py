"""A stage of a model: layers whose maps have one width and one grid, and how the tokens of these lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from layerfuse.errors import InputError
from layerfuse.features import Grid
from layerfuse.registry import unknown_name_message

__all__ = ["LAYOUTS", "Stage", "stages_of_layers"]

_Shape = tuple[int, ...]

# What a block puts out: the shape that it has of B images, P prefix tokens, a grid and C channels, and how it becomes
# (B, P + N, C). H * W of P = 0 is N.
LAYOUTS: dict[str, tuple[Callable[[int, int, Grid, int], _Shape], Callable[[torch.Tensor], torch.Tensor]]] = {
    "NLC": (lambda b, p, grid, c: (b, p + grid[0] * grid[1], c), lambda hidden: hidden),
    "NHWC": (lambda b, p, grid, c: (b, *grid, c), lambda hidden: hidden.flatten(1, 2)),
    "NCHW": (lambda b, p, grid, c: (b, c, *grid), lambda hidden: hidden.flatten(2).transpose(1, 2)),
}


@dataclass(frozen=True)
class Stage:
    """Consecutive layers of one width, one grid and one layout.

    Args:
        num_blocks: as many layers; the first stage has layer 0, too.
        embed_dim: C, width of the maps.
        stride: (height, width) of a cell, in pixels.
        layout: of what a block takes and returns: ``"NLC"`` (B, P + N, C), ``"NHWC"`` (B, H, W, C) or ``"NCHW"``
            (B, C, H, W); the last two without prefix tokens.
        unrolled: of blocks that keep the tokens of a window together, as Hiera's: the (height, width) by which the grid
            was split, first split first. The tokens lie in the order of all positions inside the windows, then of the
            windows.

    Raises:
        ValueError: if there is no such layout, or a number is less than 1.
    """

    num_blocks: int
    embed_dim: int
    stride: tuple[int, int]
    layout: str = "NLC"
    unrolled: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(unknown_name_message("layout", self.layout, LAYOUTS))
        if min(self.num_blocks, self.embed_dim, *self.stride) < 1:
            raise InputError(
                f"a stage has {self.num_blocks} blocks of width {self.embed_dim} and a stride of {self.stride} pixels; "
                "all must be at least 1."
            )

    def grid(self, patches: Grid, patch_size: tuple[int, int]) -> Grid:
        """Return the grid of this stage for a grid of patches of a size in pixels; a rest makes a cell of its own."""
        # From stage to stage an odd edge is padded, or covered by an overlapping window: every half is rounded up.
        height, width = (
            -(-count * edge // stride) for count, edge, stride in zip(patches, patch_size, self.stride, strict=True)
        )
        return height, width

    def shape(self, num_images: int, num_prefix_tokens: int, grid: Grid) -> _Shape:
        """Return the shape that a block of this stage puts out."""
        return LAYOUTS[self.layout][0](num_images, num_prefix_tokens, grid, self.embed_dim)

    def tokens(self, hidden: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Return what a block put out as (B, P + N, C), patches row-major; a view, but of unrolled tokens."""
        tokens = LAYOUTS[self.layout][1](hidden)
        if not self.unrolled:
            return tokens
        depth = len(self.unrolled)
        splits = [edge for split in self.unrolled for edge in split]
        rows, columns = grid
        for height, width in self.unrolled:
            rows, columns = rows // height, columns // width
        # (B, h_1, w_1, …, h_k, w_k, rows, columns, C): the first split is the finest, so it counts fastest.
        parts = tokens.unflatten(1, (*splits, rows, columns))
        down, across = ([first + 2 * step for step in range(depth, -1, -1)] for first in (1, 2))
        return parts.permute(0, *down, *across, 2 * depth + 3).flatten(1, -2)


def stages_of_layers(stages: tuple[Stage, ...], num_blocks: int) -> tuple[Stage, ...]:
    """Return the stage of each layer, 0 to ``num_blocks``.

    Raises:
        ValueError: if the stages have another number of blocks.
    """
    ends = list(accumulate(stage.num_blocks for stage in stages))
    if ends[-1] != num_blocks:
        raise InputError(
            f"the stages have {' + '.join(str(stage.num_blocks) for stage in stages)} = {ends[-1]} blocks, and the "
            f"model has {num_blocks}; say of every block to which stage it belongs."
        )
    blocks = [stage for stage in stages for _ in range(stage.num_blocks)]
    return (blocks[0], *blocks)
