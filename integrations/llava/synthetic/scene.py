"""What is in an image of the embedded data set, before it is drawn.

An image of 64×64 pixels is a grid of 8×8 cells, each the size of one patch of the embedded backbone.
A scene holds a photograph crop, one string of three characters on a plate, and two to five objects.
No two objects have the same colour, so that "the red object" names exactly one.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from .photographs import SPLITS, Crop, sample_crop

__all__ = [
    "CELL",
    "CHARACTERS",
    "COLORS",
    "GRID",
    "IMAGE_SIZE",
    "SHAPES",
    "TEXT_LENGTH",
    "Scene",
    "SceneObject",
    "SceneText",
    "sample_scene",
    "split_of_string",
]

CELL = 8
"""Side of a grid cell, in pixels: the backbone's patch size."""
GRID = 8
"""Cells along each side."""
IMAGE_SIZE = CELL * GRID
"""Side of an image, in pixels."""
CHARACTERS = "ACEFHKLNPRTUVXY23479"
"""Characters of the strings; pairs that look alike at 5×7 pixels (O and 0, I and 1, …) are left out."""
TEXT_LENGTH = 3
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")

_NUM_OBJECTS = (2, 5)
_EXTENTS = {1: 7, 2: 14}  # cells along a side -> side in pixels
_LARGE_PROBABILITY = 0.35


@dataclass(frozen=True)
class SceneObject:
    """An object: one of `SHAPES` filled with one of `COLORS`, inside a square of whole cells.

    Attributes:
        row: first grid row it covers; `column` likewise.
        cells: cells along a side, 1 (small) or 2 (large).
        left: first pixel column of its bounding square; `top` is its first pixel row.
        extent: side of its bounding square, in pixels.
    """

    shape: str
    color: str
    row: int
    column: int
    cells: int
    left: int
    top: int
    extent: int

    @property
    def size(self) -> str:
        """`small` (one cell) or `large` (2×2 cells)."""
        return "large" if self.cells > 1 else "small"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Tight box (x1, y1, x2, y2) as fractions of the image's side, right and bottom edges exclusive."""
        right, bottom = self.left + self.extent, self.top + self.extent
        x1, y1, x2, y2 = (v / IMAGE_SIZE for v in (self.left, self.top, right, bottom))
        return x1, y1, x2, y2


@dataclass(frozen=True)
class SceneText:
    """The string: `TEXT_LENGTH` different characters, one a cell, from grid place (`row`, `column`) to the right."""

    string: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """One image's content; `objects` are in reading order of their first cell."""

    crop: Crop
    text: SceneText
    objects: tuple[SceneObject, ...]
    noise_seed: int

    @property
    def photograph(self) -> str:
        """What the background photograph shows."""
        return self.crop.photograph


def split_of_string(string: str) -> str:
    """Return the only split that may show a string: 80 % of all strings train, 10 % validate, 10 % test."""
    # A checksum, because Python's own hash differs from one process to the next.
    bucket = zlib.crc32(string.encode()) % 10
    return SPLITS[0] if bucket < 8 else SPLITS[bucket - 7]


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draw a scene of a split; the same generator state gives the same scene."""
    crop = sample_crop(rng, split, IMAGE_SIZE)
    occupied = np.zeros((GRID, GRID), dtype=bool)
    text = _sample_text(rng, split)
    occupied[text.row, text.column : text.column + TEXT_LENGTH] = True
    count = int(rng.integers(_NUM_OBJECTS[0], _NUM_OBJECTS[1] + 1))
    colors = rng.permutation(len(COLORS))[:count]
    # Large ones first: a small one always finds a free cell afterwards.
    sizes = sorted((2 if rng.random() < _LARGE_PROBABILITY else 1 for _ in range(count)), reverse=True)
    objects = [_place(rng, occupied, COLORS[color], cells) for color, cells in zip(colors, sizes, strict=True)]
    objects.sort(key=lambda item: (item.row, item.column))
    return Scene(crop, text, tuple(objects), int(rng.integers(2**31)))


def _sample_text(rng: np.random.Generator, split: str) -> SceneText:
    """Draw a string of the split and its place."""
    while True:
        picked = rng.permutation(len(CHARACTERS))[:TEXT_LENGTH]
        string = "".join(CHARACTERS[i] for i in picked)
        if split_of_string(string) == split:
            break
    row, column = int(rng.integers(GRID)), int(rng.integers(GRID - TEXT_LENGTH + 1))
    return SceneText(string, row, column)


def _place(rng: np.random.Generator, occupied: np.ndarray, color: str, cells: int) -> SceneObject:
    """Put an object on free cells, which are then marked in `occupied`."""
    places = GRID - cells + 1
    free = [
        (row, column)
        for row in range(places)
        for column in range(places)
        if not occupied[row : row + cells, column : column + cells].any()
    ]
    # At most 23 of 64 cells are ever taken, so a free place is always left.
    assert free
    row, column = free[int(rng.integers(len(free)))]
    occupied[row : row + cells, column : column + cells] = True
    extent = _EXTENTS[cells]
    # Everything keeps to the cells: at this size a model cannot also learn to undo shifts within minutes.
    margin = (cells * CELL - extent) // 2
    left, top = column * CELL + margin, row * CELL + margin
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    return SceneObject(shape, color, row, column, cells, left, top, extent)
