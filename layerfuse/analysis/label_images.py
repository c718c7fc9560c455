"""Labels of patches from label images: one class number a pixel, as datasets for segmentation have them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from layerfuse.errors import InputError
from layerfuse.features import Grid
from layerfuse.preprocessing import Preprocessing

__all__ = ["IGNORED_CLASS", "patch_labels"]

IGNORED_CLASS = 255
"""Class of pixels that have none, in label images."""

_MODES = ("1", "L", "P")


def patch_labels(label_image: Image.Image, preprocessing: Preprocessing, grid: Grid) -> torch.Tensor:
    """Return the commonest class of each cell's pixels, (N,) row-major over the grid.

    The label image is scaled, cropped and padded as its picture is, without mixing classes.

    Args:
        label_image: class numbers 0 to 254 as grey levels or palette indices, `IGNORED_CLASS` for none; as large as
            the picture.
        preprocessing: of the picture.
        grid: (H, W) of the map, in patches.

    Returns:
        Class numbers, int64; -1 for cells of which most pixels have no class, or lie beyond the picture. Of classes
        that are equally common the lowest.

    Raises:
        ValueError: if the label image has colours, or more than eight bits.
    """
    if label_image.mode not in _MODES:
        raise InputError(
            f"the label image has mode {label_image.mode!r}; class numbers are grey levels or palette indices of "
            f"8 bits ({', '.join(_MODES)}), {IGNORED_CLASS} for no class."
        )
    info = {**label_image.info}
    info.pop("transparency", None)
    grey = Image.fromarray(np.asarray(label_image, dtype=np.uint8))
    grey.info = info  # how the picture is turned
    beyond = (IGNORED_CLASS,) * 3
    geometry = replace(preprocessing, interpolation="nearest", mean=(1.0,) * 3, std=(1.0,) * 3, fill=beyond)
    numbers: npt.NDArray[np.int64] = np.asarray(geometry.fit(grey))[..., 0].astype(np.int64)
    (height, width), (rows, columns) = numbers.shape, grid
    cells = (np.arange(height) * rows // height)[:, None] * columns + np.arange(width) * columns // width
    counts = np.bincount((cells * 256 + numbers).ravel(), minlength=rows * columns * 256).reshape(-1, 256)
    classes = torch.from_numpy(counts).argmax(1)
    return torch.where(classes == IGNORED_CLASS, -1, classes)
