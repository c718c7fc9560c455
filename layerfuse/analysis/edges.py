"""Labels that images bring themselves: how much edge there is in each cell."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from layerfuse.errors import InputError
from layerfuse.features import Grid

__all__ = ["edge_labels", "edge_strength"]


def edge_strength(images: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the mean length of the brightness gradient in each cell, (B, N), row-major over the grid.

    Args:
        images: (B, channels, height, width); brightness is the mean of the channels.
        grid: (H, W), in cells that cover the image.

    Raises:
        ValueError: if these are no images of at least 2×2 pixels.
    """
    if images.ndim != 4 or min(images.shape[2:]) < 2:
        raise InputError(
            f"edge_strength got shape {tuple(images.shape)}; give (B, channels, height, width), at least 2×2 pixels."
        )
    brightness = images.float().mean(1)
    down, right = torch.gradient(brightness, dim=(1, 2))
    return F.adaptive_avg_pool2d(torch.hypot(down, right), grid).flatten(1)


def edge_labels(strength: torch.Tensor, num_classes: int = 2) -> torch.Tensor:
    """Return classes 0 (no edge) to ``num_classes - 1`` of strengths, of any shape; each class has as many cells.

    A strength that is NaN, as of a cell beyond the picture, has the class -1: none.

    Raises:
        ValueError: if ``num_classes`` is below 2, or no cell has a strength.
    """
    if num_classes < 2:
        raise InputError(f"num_classes is {num_classes}; give at least 2.")
    ordered = strength[~strength.isnan()].sort().values
    if not len(ordered):
        raise InputError("no cell has a strength: all are NaN, or there are none.")
    bounds = ordered[[len(ordered) * number // num_classes for number in range(1, num_classes)]]
    return torch.bucketize(strength.contiguous(), bounds, right=True).masked_fill(strength.isnan(), -1)
