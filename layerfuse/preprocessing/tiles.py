"""Pictures cut into tiles of a backbone's size, beside an overview of the whole: AnyRes, as in LLaVA-NeXT."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from PIL import Image

from layerfuse.errors import InputError
from layerfuse.preprocessing.pixels import image_size
from layerfuse.preprocessing.stacked import AnyPreprocessing, StackedPreprocessing

__all__ = ["prepare_tiles", "tile_pixels"]


def prepare_tiles(
    image: Image.Image, preprocessing: AnyPreprocessing, canvas: tuple[int, int] | None = None
) -> torch.Tensor:
    """Prepare a picture and its tiles as `tile_pixels` does, and normalise them: (tiles, C, height, width) float32."""
    return preprocessing.normalize(tile_pixels(image, preprocessing, canvas))


def tile_pixels(
    image: Image.Image, preprocessing: AnyPreprocessing, canvas: tuple[int, int] | None = None
) -> torch.Tensor:
    """Fit a picture, and with a canvas cut the tiles of the picture scaled into it, row by row.

    Args:
        image: of any size.
        preprocessing: how the whole picture is prepared, in its mode. Tiles have its size, range and interpolation; a
            mode is about whole pictures. Of several backbones the largest size is a tile's, and the first one's
            interpolation scales the picture.
        canvas: (height, width) in pixels, multiples of the preprocessing's size: the picture is scaled until it fits,
            its shape kept, and lies in the middle, on black.

    Returns:
        (tiles, C, height, width) uint8, in front the whole picture; that alone without a canvas. The preprocessing
        normalises them.

    Raises:
        ValueError: if the canvas is no whole number of tiles; and as `Preprocessing.__call__`, like TypeError.
    """
    overview = preprocessing.pixels(image)
    if canvas is None:
        return overview[None]
    height, width = preprocessing.size
    if min(canvas) < 1 or canvas[0] % height or canvas[1] % width:
        raise InputError(
            f"a canvas of {canvas[0]} x {canvas[1]} pixels (height x width) is no whole number of tiles of {height} x "
            f"{width}; give multiples."
        )
    scaled = _fitted(image_size(image, upright=preprocessing.upright), canvas)
    exact = preprocessing.changed(mode="squash", crop_pct=1.0)
    first = exact.parts[0] if isinstance(exact, StackedPreprocessing) else exact
    whole = Image.new("RGB", (canvas[1], canvas[0]))
    whole.paste(replace(first, size=scaled).fit(image), ((canvas[1] - scaled[1]) // 2, (canvas[0] - scaled[0]) // 2))
    corners = [(left, top) for top in range(0, canvas[0], height) for left in range(0, canvas[1], width)]
    tiles = [whole.crop((left, top, left + width, top + height)) for left, top in corners]
    as_cut = exact.changed(upright=False)
    return torch.stack([overview, *map(as_cut.pixels, tiles)])


def _fitted(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Scale (height, width) to the largest that fits into a canvas, rounded up, as transformers' LLaVA-NeXT does."""
    down, right = (most / edge for most, edge in zip(canvas, size, strict=True))
    if right < down:
        return min(math.ceil(size[0] * right), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * down), canvas[1])
