"""AnyRes, as in LLaVA-NeXT: an overview of the image and, row by row, the tiles it is cut into.

    image ─┬─ the backbone's own preprocessing ──────────────► overview ──► its tokens
           └─ scaled into one of the pinpoints, cut into tiles ─► one grid, its border cut off, each row + newline

Which pinpoint fits, which border is cut off, and so how many tokens there are, is as in transformers' LLaVA-NeXT, to
the rounding; tests hold it against transformers' own functions. Here is the arithmetic alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerfuse.errors import InputError
from layerfuse.features import Grid

from .layout import ImageLayout, ImageSize

__all__ = ["AnyResLayout", "default_pinpoints"]

# LLaVA-NeXT's in tiles (height, width), in its order, which decides between two that fit alike.
_SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def default_pinpoints(tile_size: ImageSize) -> tuple[ImageSize, ...]:
    """LLaVA-NeXT's pinpoints, in pixels: 336 x 672, 672 x 336, 672 x 672, 1008 x 336, 336 x 1008 for tiles of 336."""
    height, width = tile_size
    return tuple((rows * height, columns * width) for rows, columns in _SHAPES)


@dataclass(frozen=True)
class AnyResLayout(ImageLayout):
    """An overview and tiles, whose rows end with the model's newline token.

    Attributes:
        tile_size: (height, width) of a tile in pixels: the size that the backbone takes.
        grid: (H, W) of the tokens of a tile, as the fuser gives them.
        pinpoints: (height, width) in pixels of the canvases among which the best fitting is chosen; without any there
            is the overview alone, with a newline behind it.

    Raises:
        ValueError: if a size is none, or a pinpoint is no whole number of tiles.
    """

    name: ClassVar[str] = "anyres"
    tile_size: ImageSize
    grid: Grid
    pinpoints: tuple[ImageSize, ...]

    def __post_init__(self) -> None:
        """Make lists, as JSON has them, tuples, and check them."""
        object.__setattr__(self, "tile_size", _pair("tile_size", self.tile_size))
        object.__setattr__(self, "grid", _pair("grid", self.grid))
        object.__setattr__(self, "pinpoints", tuple(_pair("pinpoints", each) for each in self.pinpoints))
        height, width = self.tile_size
        for canvas in self.pinpoints:
            if canvas[0] % height or canvas[1] % width:
                raise InputError(
                    f"pinpoint {canvas[0]} x {canvas[1]} (height x width) is no whole number of tiles of {height} x "
                    f"{width} pixels; give multiples, such as {2 * height} x {width}."
                )

    def num_tokens(self, image_size: ImageSize | None = None) -> int:
        """Count the tokens of the overview and of the tiles' rows, newlines included."""
        overview = math.prod(self.grid)
        if not self.pinpoints:
            return overview + 1
        rows, columns = self.seen(image_size or self.tile_size)
        return overview + len(rows) * (len(columns) + 1)

    def num_tiles(self, image_size: ImageSize | None = None) -> int:
        """Count the tiles, the overview among them."""
        return 1 + math.prod(self.shape(image_size or self.tile_size))

    @property
    def largest_size(self) -> ImageSize:
        """The pinpoint whose image takes most tokens."""
        return max(self.pinpoints, key=self.num_tokens, default=self.tile_size)

    def canvas(self, image_size: ImageSize) -> ImageSize | None:
        """Choose the pinpoint that keeps most of an image's pixels, of several the smallest, and of these the first.

        Raises:
            ValueError: if an image has no pixel.
        """
        if min(image_size) < 1:
            raise InputError(
                f"an image of {image_size[0]} x {image_size[1]} pixels (height x width) has none; give its size before "
                "preparing, both at least 1."
            )

        def kept(pinpoint: ImageSize) -> tuple[int, int]:
            scale = min(pinpoint[1] / image_size[1], pinpoint[0] / image_size[0])
            scaled = int(image_size[1] * scale) * int(image_size[0] * scale)
            return min(scaled, math.prod(image_size)), -math.prod(pinpoint)

        return max(self.pinpoints, key=kept, default=None)

    def shape(self, image_size: ImageSize) -> tuple[int, int]:
        """Rows and columns of tiles that an image is cut into, beside its overview; zeros without pinpoints."""
        height, width = self.canvas(image_size) or (0, 0)
        return height // self.tile_size[0], width // self.tile_size[1]

    def seen(self, image_size: ImageSize) -> tuple[range, range]:
        """Rows and columns of the grid of all tiles in which the image lies; the rest is its border."""
        rows, columns = (tiles * cells for tiles, cells in zip(self.shape(image_size), self.grid, strict=True))
        # In cells, which need not be square; of square ones the image's own size is taken, as in LLaVA-NeXT.
        down, right = self.grid[0] * self.tile_size[1], self.grid[1] * self.tile_size[0]
        common = math.gcd(down, right)
        height, width = image_size[0] * down // common, image_size[1] * right // common
        if width / height > columns / rows:
            return _middle(rows, height * (columns / width)), range(columns)
        return range(rows), _middle(columns, width * (rows / height))


def _middle(cells: int, length: float) -> range:
    """The cells in the middle, as many as the length has, rounded down, or one more to be in the middle."""
    border = (cells - int(round(length, 7))) // 2
    return range(border, cells - border)


def _pair(name: str, value: Sequence[int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(pair) != 2 or not all(isinstance(edge, int) and edge >= 1 for edge in pair):
        raise InputError(f"{name} has {value!r:.80}; give (height, width), each 1 or more, such as [336, 672].")
    return pair[0], pair[1]
