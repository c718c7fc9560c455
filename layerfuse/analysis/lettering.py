"""Labels that are made: letters of known heights, written into pictures, to see what layers can read.

Each word is of three letters, drawn at random; the one in the middle is the label, and the other two stand beside it as
they do in text. Ink and paper are light on dark or dark on light, by chance, so that no layer reads a letter off the
brightness of single pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont

from layerfuse.errors import InputError
from layerfuse.features import Grid

__all__ = ["LETTERS", "Lettering", "write_letters"]

LETTERS = "AEHKNRSX"
"""Letters that are written; chance is one in eight."""

# Of a letter's height: from one letter of a word to the next, and paper around the word.
_PITCH, _MARGIN = 1.0, 0.25
# Grey levels of ink and paper.
_DARK, _LIGHT = (0, 70), (185, 255)


@dataclass(frozen=True)
class Lettering:
    """A picture with letters in it.

    Attributes:
        picture: RGB.
        cells: (K,) cells of the grid, row-major, in whose middle, give or take a quarter of a cell, a letter stands.
        letters: (K,) which one, as positions in `LETTERS`.
    """

    picture: Image.Image
    cells: torch.Tensor
    letters: torch.Tensor


def write_letters(
    picture: Image.Image,
    height: int,
    *,
    grid: Grid,
    coarsest: Grid | None = None,
    count: int | None = None,
    random: torch.Generator,
) -> Lettering:
    """Return a copy of a picture with words in rows and columns, as many as have room.

    Args:
        picture: RGB, as a backbone sees it: before it is normalised, after it is scaled.
        height: of the capital letters, in pixels of this picture.
        grid: (H, W) of the map that is probed, in patches.
        coarsest: the coarsest of several grids, no two letters are in one cell of it; ``grid`` if None.
        count: words at most; which of the places are taken is chosen at random.
        random: chooses letters, places, ink and paper.

    Raises:
        ValueError: if the picture has no room for a word, or the height is below 3 pixels.
    """
    places = _places(picture.size, height, grid, coarsest or grid)
    taken = torch.randperm(len(places), generator=random)[:count].sort().values.tolist()
    written = picture.copy()
    draw = ImageDraw.Draw(written)
    letters = torch.randint(len(LETTERS), (len(taken), 3), generator=random)
    cell = (picture.width / grid[1], picture.height / grid[0])
    cells = []
    for place, word in zip(taken, letters.tolist(), strict=True):
        row, column = places[place]
        cells.append(row * grid[1] + column)
        shift = (torch.rand(2, generator=random) - 0.5).tolist()
        middle = ((column + 0.5 + shift[0] / 2) * cell[0], (row + 0.5 + shift[1] / 2) * cell[1])
        _write(draw, middle, height, "".join(LETTERS[letter] for letter in word), random)
    return Lettering(written, torch.tensor(cells), letters[:, 1])


def _places(size: tuple[int, int], height: int, grid: Grid, coarsest: Grid) -> list[tuple[int, int]]:
    """Return the cells (row, column) that the middle letters stand in: words neither touch nor leave the picture."""
    if height < 3:
        raise InputError(f"letters of {height} pixels are none; give heights of at least 3 pixels.")
    word = (3 * _PITCH * height + 2 * _MARGIN * height, height * (1 + 2 * _MARGIN))
    ranges = []
    for edge, cells, large, room in zip(size, grid[::-1], coarsest[::-1], word, strict=True):
        cell = edge / cells
        step = math.ceil(max((room + cell / 2) / cell, cells / large))
        first = math.ceil((room / 2 + cell / 4) / cell - 0.5)
        ranges.append(range(first, cells - first, step))
    columns, rows = ranges
    if not (columns and rows):
        raise InputError(
            f"a word of letters of {height} pixels has no room in a picture of {size[1]}×{size[0]} pixels; give "
            "smaller letters, or larger pictures."
        )
    return [(row, column) for row in rows for column in columns]


def _write(
    draw: ImageDraw.ImageDraw, middle: tuple[float, float], height: int, word: str, random: torch.Generator
) -> None:
    dark, light = (int(torch.randint(*span, (1,), generator=random)) for span in (_DARK, _LIGHT))
    ink, paper = (dark, light) if torch.rand(1, generator=random) < 0.5 else (light, dark)
    across, down = (1.5 * _PITCH + _MARGIN) * height, (0.5 + _MARGIN) * height
    x, y = middle
    draw.rectangle((x - across, y - down, x + across, y + down), fill=(paper,) * 3)
    font, lowered = _font(height)
    for position, letter in enumerate(word):
        # From the line on which letters stand: Pillow's middle is that of the font, with its descenders.
        draw.text((x + (position - 1) * _PITCH * height, y + lowered), letter, fill=(ink,) * 3, font=font, anchor="ms")


@lru_cache(maxsize=64)
def _font(height: int) -> tuple[ImageFont.FreeTypeFont, float]:
    """Return Pillow's own font so large that capitals have this height, and half of their height in pixels."""
    trial = _load(100.0)
    _, top, _, bottom = trial.getbbox("H", anchor="ms")
    share = (bottom - top) / 100
    return _load(height / share), height / 2


def _load(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError("letters are written with Pillow's own font, which needs Pillow 10.1 or later with FreeType.")
    return font
