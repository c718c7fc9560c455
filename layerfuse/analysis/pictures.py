"""Pictures of feature maps, as in Figure 5 of the MMFuser paper (arXiv:2410.11829).

The figure shows, for one image, the average of the key/value layers, the query layer and the output. Each map is
reduced to one number a cell, and all maps of an image share one colour scale, so that they can be compared.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from layerfuse.errors import InputError, MissingPackageError
from layerfuse.features import FeatureMaps, Grid

__all__ = ["REDUCTIONS", "check_map_tokens", "colorize", "fusion_maps", "png_bytes", "reduce_map"]

REDUCTIONS = ("norm", "component", "mean")


def reduce_map(tokens: torch.Tensor, grid: Grid, *, reduction: str = "component") -> torch.Tensor:
    """Reduce a map to one number a cell.

    Args:
        tokens: (B, N, C) patch tokens.
        grid: (H, W) of the map, in patches.
        reduction: ``"norm"``, the length of each token; ``"mean"``, the average over channels; or ``"component"``,
            the first principal component of each image's own tokens, in units of its standard deviation, with the
            sign that makes its largest value positive.

    Returns:
        (B, H, W) float32.

    Raises:
        ValueError: if the grid does not fit or the reduction is unknown.
    """
    check_map_tokens(tokens, grid)
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction {reduction!r} is unknown; known: {', '.join(REDUCTIONS)}.")
    values = tokens.detach().float().cpu()
    if reduction == "norm":
        cells = values.norm(dim=-1)
    elif reduction == "mean":
        cells = values.mean(-1)
    else:
        cells = torch.stack([_first_component(image) for image in values])
    return cells.unflatten(1, grid)


def check_map_tokens(tokens: torch.Tensor, grid: Grid) -> None:
    """Refuse tokens that are not (B, N, C) of a grid (H, W).

    Raises:
        ValueError: if they are not.
    """
    height, width = grid
    if tokens.ndim != 3 or tokens.shape[1] != height * width:
        raise InputError(
            f"tokens have shape {tuple(tokens.shape)}, which does not fit the grid {height}x{width}; expected "
            f"(B, {height * width}, C)."
        )


def _first_component(tokens: torch.Tensor) -> torch.Tensor:
    """Project (N, C) tokens on their first principal direction, scaled to variance 1."""
    centred = tokens - tokens.mean(0)
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    if strengths[0] <= 1e-6 * max(1.0, float(tokens.abs().max())):
        return torch.zeros(len(tokens))
    scores = centred @ directions[0]
    scores = scores / scores.std(unbiased=False)
    # An SVD's signs are arbitrary; without a convention pictures flip from one machine to the next.
    return scores * torch.sign(scores[scores.abs().argmax()])


def fusion_maps(
    features: FeatureMaps, fused: torch.Tensor, *, query: int = -1, reduction: str = "component"
) -> dict[str, torch.Tensor]:
    """Reduce the input and the output of a fuser to one number a cell, as the three columns of Figure 5.

    Args:
        features: L maps; all but the query are key/value layers and share its grid and width.
        fused: (B, N, C_out) output of the fuser on the query's grid.
        query: position of the query map among the L maps.
        reduction: see `reduce_map`.

    Returns:
        ``"key/value average"`` (only if L > 1), ``"query"`` and ``"output"``, each (B, H, W), in this order.

    Raises:
        ValueError: if maps have different grids or widths, or the output does not lie on the query's grid.
    """
    index = range(len(features))[query]
    values = [feature_map for i, feature_map in enumerate(features) if i != index]
    if len(set(features.grids)) > 1 or len(set(features.channels)) > 1:
        raise InputError(
            f"the maps have grids {features.grids} and widths {features.channels}; averaging key/value layers needs "
            "one grid and one width: tap layers of one backbone."
        )
    grid = features.grids[index]
    maps = {"query": features.maps[index], "output": fused}
    if values:
        maps = {"key/value average": torch.stack(values).mean(0), **maps}
    return {name: reduce_map(tokens, grid, reduction=reduction) for name, tokens in maps.items()}


def colorize(
    maps: Mapping[str, torch.Tensor] | Sequence[torch.Tensor], *, size: int = 128, colormap: str = "viridis"
) -> list[np.ndarray]:
    """Colour maps of one image, one (height, width, 3) uint8 picture each, on one scale from lowest to highest value.

    Args:
        maps: each (H, W).
        size: longer edge of the pictures, in pixels; cells become blocks, nothing is smoothed.
        colormap: name of a matplotlib colour map.

    Raises:
        ValueError: if there is no map, or matplotlib knows no such colour map.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    tensors = [tensor.detach().float().cpu() for tensor in (maps.values() if isinstance(maps, Mapping) else maps)]
    if not tensors:
        raise InputError("colorize got no maps; give at least one (H, W) map.")
    lookup = _colormap(colormap)
    low = min(float(tensor.min()) for tensor in tensors)
    high = max(float(tensor.max()) for tensor in tensors)
    pictures = []
    for tensor in tensors:
        # A constant map has no scale; it is shown as the lowest colour.
        levels = ((tensor - low) / (high - low) if high > low else torch.zeros_like(tensor)).numpy()
        blocks = max(1, size // max(tensor.shape))
        colours = lookup[np.rint(levels * 255).astype(np.int64)]
        pictures.append(colours.repeat(blocks, axis=0).repeat(blocks, axis=1))
    return pictures


def _colormap(name: str) -> np.ndarray:
    """Return a colour map as (256, 3) uint8."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "pictures are coloured with matplotlib, which is not installed; install the extra: "
            "pip install 'layerfuse[viz]'"
        ) from error
    if name not in matplotlib.colormaps:
        raise InputError(f"colour map {name!r} is unknown to matplotlib; try 'viridis', 'magma' or 'cividis'.")
    rgba = matplotlib.colormaps[name](np.linspace(0, 1, 256))
    return np.rint(rgba[:, :3] * 255).astype(np.uint8)


def png_bytes(picture: np.ndarray) -> bytes:
    """Encode a (height, width, 3) uint8 picture as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
