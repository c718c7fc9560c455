"""Photograph crops for the embedded data set, from files that ship inside the scikit-image wheel.

Every photograph is carved into three disjoint rectangles, one a split, before anything is resized,
so that no pixel of a training crop is part of a validation or test crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from layerfuse.errors import InputError, MissingFileError

__all__ = ["PHOTOGRAPHS", "SPLITS", "Crop", "photograph_path", "read_crop", "sample_crop", "split_region"]

SPLITS = ("train", "val", "test")

# What the photograph shows -> its file in skimage/data. Only files that the wheel itself contains.
PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "bricks": "brick.png",
    "cameraman": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "stars": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
}

# Source pixels per crop pixel; the smallest split region (a quarter of 300 pixels' height) still holds a crop.
_REDUCTIONS = (1.5, 2.0)


@dataclass(frozen=True)
class Crop:
    """Where a background comes from.

    Attributes:
        photograph: key of `PHOTOGRAPHS`.
        split: one of `SPLITS`; selects the rectangle of the photograph.
        reduction: index of the reduction by which the rectangle is resized before cropping.
        top: first row of the crop in the resized rectangle, in pixels; `left` is its first column.
    """

    photograph: str
    split: str
    reduction: int
    top: int
    left: int


def photograph_path(name: str) -> Path:
    """Return the file of a photograph inside the installed scikit-image.

    Raises:
        ValueError: if the photograph is not one of `PHOTOGRAPHS`.
        FileNotFoundError: if scikit-image, or the file inside it, is missing.
    """
    if name not in PHOTOGRAPHS:
        raise InputError(f"photograph {name!r} is unknown; known: {', '.join(PHOTOGRAPHS)}")
    # find_spec instead of an import: only the folder is needed, not the library.
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise MissingFileError(
            "the embedded data set draws on photographs inside scikit-image, which is not installed; "
            "install the extra: pip install 'layerfuse[llava]'"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / PHOTOGRAPHS[name]
    if not path.is_file():
        raise MissingFileError(f"photograph {name!r} is missing: {path}; reinstall scikit-image from its wheel")
    return path


def split_region(split: str, height: int, width: int) -> tuple[int, int, int, int]:
    """Return the rectangle (top, left, bottom, right), in pixels, that belongs to a split.

    Training takes the left 60 % of the columns; validation and test share the rest, above and below.

    Raises:
        ValueError: if the split is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; known: {', '.join(SPLITS)}")
    column, row = int(width * 0.6), height // 2
    if split == "train":
        return 0, 0, height, column
    return (0, column, row, width) if split == "val" else (row, column, height, width)


@cache
def _resized_region(photograph: str, split: str, reduction: int, smallest: int) -> np.ndarray:
    """Return the split's rectangle, resized, as (H, W, 3) uint8; every side holds at least `smallest` pixels."""
    with Image.open(photograph_path(photograph)) as image:
        rgb = image.convert("RGB")
    top, left, bottom, right = split_region(split, rgb.height, rgb.width)
    region = rgb.crop((left, top, right, bottom))
    factor = max(1 / _REDUCTIONS[reduction], smallest / min(region.size))
    size = (max(smallest, round(region.width * factor)), max(smallest, round(region.height * factor)))
    return np.asarray(region.resize(size, Image.Resampling.BOX))


def sample_crop(rng: np.random.Generator, split: str, size: int) -> Crop:
    """Draw a square crop of `size` pixels from the rectangles of a split."""
    names = tuple(PHOTOGRAPHS)
    photograph = names[int(rng.integers(len(names)))]
    reduction = int(rng.integers(len(_REDUCTIONS)))
    height, width = _resized_region(photograph, split, reduction, size).shape[:2]
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    return Crop(photograph, split, reduction, top, left)


def read_crop(crop: Crop, size: int) -> np.ndarray:
    """Return the crop's pixels, (size, size, 3) uint8."""
    region = _resized_region(crop.photograph, crop.split, crop.reduction, size)
    return region[crop.top : crop.top + size, crop.left : crop.left + size]
