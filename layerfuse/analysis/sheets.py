"""Sheets: a picture beside the maps of its layers, and the same maps laid over it, as Figures 1b and 5 of MMFuser.

arXiv:2410.11829. Maps in colours (`rgb_map`) are the first three principal components of the picture's own tokens, as
in DINOv2 (arXiv:2304.07193, Figure 1): cells of one colour have like tokens; colours of two maps cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from layerfuse.analysis.pages import new_figure, png_of_figure
from layerfuse.analysis.pictures import check_map_tokens
from layerfuse.errors import InputError
from layerfuse.features import Grid

__all__ = ["map_sheet", "point_sheet", "rgb_map"]

_OPACITY = 0.55
# Inches of a panel.
_PANEL = 1.55


def rgb_map(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the first three principal components of each image's tokens as red, green, blue: (B, H, W, 3) in [0, 1].

    Of each component the lowest and the highest hundredth are cut off, so that one odd token does not darken the rest.

    Args:
        tokens: (B, N, C), C at least 3.
        grid: (H, W) of the map, in patches.

    Raises:
        ValueError: if the grid does not fit, or there are fewer than three channels.
    """
    check_map_tokens(tokens, grid)
    if tokens.shape[-1] < 3 or tokens.shape[1] < 3:
        raise InputError(f"tokens have shape {tuple(tokens.shape)}; three components need 3 tokens and 3 channels.")
    images = []
    for image in tokens.detach().float().cpu():
        centred = image - image.mean(0)
        left, strengths, _ = torch.linalg.svd(centred, full_matrices=False)
        scores = left[:, :3] * strengths[:3]
        # An SVD's signs are arbitrary; without a convention colours flip from one machine to the next.
        peaks = scores.gather(0, scores.abs().argmax(0, keepdim=True))
        scores = scores * torch.where(peaks < 0, -1.0, 1.0)
        low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
        images.append(((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1))
    return torch.stack(images).unflatten(1, grid)


def map_sheet(
    picture: np.ndarray | Sequence[np.ndarray],
    maps: Mapping[str, torch.Tensor],
    *,
    common_scale: bool = False,
    dpi: int = 90,
) -> bytes:
    """Draw a picture and its maps side by side, below them the maps over the picture, as PNG.

    Args:
        picture: (height, width, 3) uint8, as the model sees it; or one for each map, of which the first is shown alone.
        maps: title -> (H, W) numbers, or (H, W, 3) colours in [0, 1].
        common_scale: one scale of colours for all numbers, from 0 to the highest; else each map has its own.
        dpi: pixels an inch.

    Raises:
        ValueError: if there is no map.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if not maps:
        raise InputError("map_sheet got no maps; give at least one (H, W) map.")
    pictures = _one_each(picture, len(maps))
    height, width = pictures[0].shape[:2]
    figure = new_figure(_PANEL * (1 + len(maps)), (_PANEL * height / width + 0.12) * 2 + 0.2)
    panels = figure.subplots(2, 1 + len(maps), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    panels[0][0].imshow(pictures[0])
    panels[0][0].set_title("as the model sees it", fontsize=8)
    scale = {"vmin": 0, "vmax": max(float(each.max()) for each in maps.values())} if common_scale else {}
    for (above, below), seen, (title, cells) in zip(panels[:, 1:].T, pictures, maps.items(), strict=True):
        # Cells are drawn over the pixels that they cover.
        place = (0, seen.shape[1], seen.shape[0], 0)
        grey = np.repeat(seen.mean(-1, keepdims=True) / 255, 3, axis=-1)
        above.set_title(title, fontsize=8)
        shown = cells.numpy()
        above.imshow(shown, extent=place, interpolation="nearest", **scale)
        below.imshow(grey, extent=place)
        below.imshow(shown, extent=place, interpolation="nearest", alpha=_OPACITY, **scale)
    return png_of_figure(figure, dpi=dpi)


def point_sheet(
    picture: np.ndarray | Sequence[np.ndarray],
    locations: torch.Tensor,
    weights: torch.Tensor,
    *,
    grid: Grid,
    cells: Sequence[tuple[int, int]],
    titles: Sequence[str],
    dpi: int = 90,
) -> bytes:
    """Draw where some cells of the query map read each value map, over the picture, as PNG; large points weigh more.

    Args:
        picture: (height, width, 3) uint8, as the model sees it; or one for each value map.
        locations: (N, M, L, K, 2) sampling points as (x, y) in [0, 1] of the picture.
        weights: (N, M, L, K) of the points.
        grid: (H, W) of the query map.
        cells: (row, column) of query cells, each with a colour of its own; a cross marks the cell.
        titles: of the L value maps.
        dpi: pixels an inch.

    Raises:
        ValueError: if a cell lies outside of the grid.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    pictures = _one_each(picture, len(titles))
    height, width = pictures[0].shape[:2]
    if outside := [cell for cell in cells if not (0 <= cell[0] < grid[0] and 0 <= cell[1] < grid[1])]:
        raise InputError(f"cells {outside} lie outside of the grid {grid[0]}x{grid[1]}; give (row, column) from 0.")
    figure = new_figure(1.5 * _PANEL * len(titles), 1.5 * _PANEL * height / width + 0.25)
    largest = float(weights.max())
    for level, (axes, title) in enumerate(zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True)):
        axes.set_axis_off()
        axes.set_title(title, fontsize=8)
        height, width = pictures[level].shape[:2]
        axes.imshow(pictures[level], extent=(0, width, height, 0), alpha=0.7)
        for number, (row, column) in enumerate(cells):
            points = locations[row * grid[1] + column, :, level].reshape(-1, 2).float().numpy()
            sizes = weights[row * grid[1] + column, :, level].reshape(-1).float().numpy() / largest
            colour = f"C{number}"
            axes.scatter(points[:, 0] * width, points[:, 1] * height, s=4 + 40 * sizes, color=colour, linewidths=0)
            centre = ((column + 0.5) * width / grid[1], (row + 0.5) * height / grid[0])
            axes.plot(*centre, "+", color="white", markersize=9, markeredgewidth=2.5)
            axes.plot(*centre, "+", color=colour, markersize=8, markeredgewidth=1.2)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
    return png_of_figure(figure, dpi=dpi)


def _one_each(picture: np.ndarray | Sequence[np.ndarray], count: int) -> Sequence[np.ndarray]:
    """Return one picture for each of several maps.

    Raises:
        ValueError: if there are several, but not one for each.
    """
    pictures = [picture] * count if isinstance(picture, np.ndarray) else list(picture)
    if len(pictures) != count:
        raise InputError(f"{len(pictures)} pictures were given for {count} maps; give one, or one for each map.")
    return pictures
