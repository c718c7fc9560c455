"""Images that are cut into tiles: the layout a recipe asks for, tiles without padding, their tokens put together.

The backbone, fuser and projector see tiles as they see images; only here it matters which tiles make up one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange

from integrations.llava.config import ModelConfig
from integrations.llava.image_layout import AnyResLayout, FixedLayout, ImageLayout, ImageSize, default_pinpoints
from layerfuse.backbones import AnyBackbone
from layerfuse.errors import InputError
from layerfuse.features import Grid
from layerfuse.fusers import Fuser

__all__ = ["ImageTiles", "as_sizes", "check_layout", "image_tiles", "pack_tiles", "recipe_layout"]


@dataclass(frozen=True)
class ImageTiles:
    """Which tiles belong to which image of a batch.

    Attributes:
        layout: of the model.
        sizes: (height, width) of each image before it was prepared; None where nobody asks.
        counts: number of tiles of each image.
        pixels: (tiles, C, height, width), image after image.
    """

    layout: ImageLayout
    sizes: Sequence[ImageSize | None]
    counts: Sequence[int]
    pixels: torch.Tensor

    def repeat(self, rows: torch.Tensor) -> torch.Tensor:
        """Repeat the row of each image, (B, …), for each of its tiles; a ValueError if there are not as many rows."""
        if not isinstance(self.layout, AnyResLayout):
            return rows
        if len(rows) != len(self.counts):
            raise InputError(f"condition has {len(rows)} rows for {len(self.counts)} images; give one row an image.")
        return rows[[image for image, count in enumerate(self.counts) for _ in range(count)]]

    def pack(self, tokens: torch.Tensor, newline: torch.Tensor | None) -> list[torch.Tensor]:
        """Make of the tokens of all tiles, (tiles, N, D), one tensor (N of the image, D) an image.

        The newline (D,) ends rows of images that are cut into tiles.
        """
        if newline is None or not isinstance(self.layout, AnyResLayout):
            return list(tokens)
        images = zip(tokens.split(list(self.counts)), self.sizes, strict=True)
        return [pack_tiles(own, self.layout, size or self.layout.tile_size, newline) for own, size in images]


def pack_tiles(
    tokens: torch.Tensor, layout: AnyResLayout, image_size: ImageSize, newline: torch.Tensor
) -> torch.Tensor:
    """Put the tokens of an image's tiles together, as transformers' LLaVA-NeXT does.

    Args:
        tokens: (tiles, N, D), in front the overview.
        layout: says where the image lies on the tiles.
        image_size: of the image.
        newline: (D,), stands behind every row, or behind an overview alone.

    Returns:
        (N of the image, D).
    """
    newline, overview, cut = newline.to(tokens), tokens[0], tokens[1:]
    if not len(cut):
        return torch.cat([overview, newline[None]])
    tiles, (rows, columns) = layout.shape(image_size), layout.seen(image_size)
    cells = rearrange(cut, "(r c) (h w) d -> (r h) (c w) d", r=tiles[0], h=layout.grid[0])
    cells = cells[rows.start : rows.stop, columns.start : columns.stop]
    lines = torch.cat([cells, newline.expand(len(cells), 1, -1)], dim=1)
    return torch.cat([overview, lines.flatten(0, 1)])


def as_sizes(image_sizes: torch.Tensor | Sequence[ImageSize]) -> list[ImageSize]:
    """Read (height, width) of images, (images, 2); for a tensor on a GPU the host waits, for numbers it does not.

    Raises:
        ValueError: if they have another shape.
    """
    given = torch.as_tensor(image_sizes)
    if given.ndim != 2 or given.shape[1] != 2:
        raise InputError(
            f"image_sizes has shape {tuple(given.shape)}; give (images, 2), height and width before preparing, as the "
            "processor returns them."
        )
    return [(int(height), int(width)) for height, width in given.tolist()]


def image_tiles(
    layout: ImageLayout,
    pixel_values: torch.Tensor | None,
    image_sizes: torch.Tensor | Sequence[ImageSize] | None,
) -> ImageTiles:
    """Find the tiles of each image, and drop those that only fill a batch up.

    Args:
        layout: of the model.
        pixel_values: (B, C, height, width); of images that are cut into tiles (B, most tiles, C, height, width), filled
            up behind, or (tiles, C, height, width), image after image; or maps of the tiles, (tiles, N, C).
        image_sizes: (B, 2), height and width before preparing; read only if images are cut into tiles.

    Raises:
        ValueError: if pixels or sizes are missing, or there are other numbers of images or tiles than they say.
    """
    if pixel_values is None:
        raise InputError("there are neither pixel_values nor feature_maps; give one of them for every image.")
    if not isinstance(layout, AnyResLayout):
        count = len(pixel_values)
        return ImageTiles(layout, [None] * count, [1] * count, pixel_values)
    if image_sizes is None:
        raise InputError(
            "this model cuts images into tiles by their size, and image_sizes is missing; give (images, 2), height and "
            "width before preparing. The processor returns it beside pixel_values."
        )
    sizes = as_sizes(image_sizes)
    counts = [layout.num_tiles(size) for size in sizes]
    given = tuple(pixel_values.shape)
    fits_flat = len(given) in (3, 4) and given[0] == sum(counts)
    fits_padded = len(given) == 5 and given[0] == len(sizes) and given[1] >= max(counts, default=0)
    if not fits_flat and not fits_padded:
        raise InputError(
            f"pixel_values has shape {given}, but images of image_sizes {sizes} have {counts} tiles; give (tiles, "
            "channels, height, width), image after image, or (images, most tiles, channels, height, width), as the "
            "processor returns them."
        )
    if fits_padded:
        pixel_values = torch.cat([own[:count] for own, count in zip(pixel_values, counts, strict=True)])
    return ImageTiles(layout, sizes, counts, pixel_values)


def recipe_layout(config: ModelConfig, backbone: AnyBackbone, fuser: Fuser, image_token_id: int) -> ImageLayout:
    """Build the layout that a recipe's model has; a ValueError if its fuser's tokens cannot be put together."""
    if config.image_layout == "fixed":
        return FixedLayout(image_token_id, fuser.num_tokens(backbone.grids()[: fuser.num_layers]))
    height, width = backbone.image_size
    pinpoints = config.pinpoints or default_pinpoints((height, width))
    grid = _tile_grid(backbone, fuser)
    return AnyResLayout(image_token_id, (height, width), grid, tuple((own[0], own[1]) for own in pinpoints))


def check_layout(layout: ImageLayout, backbone: AnyBackbone, fuser: Fuser) -> None:
    """Raise a ValueError for a layout of tiles that are not what the backbone takes and the fuser gives."""
    if not isinstance(layout, AnyResLayout):
        return
    made = (tuple(backbone.image_size), _tile_grid(backbone, fuser))
    if made != (layout.tile_size, layout.grid):
        raise InputError(
            f"the layout's tiles have {layout.tile_size} pixels and {layout.grid} tokens, but the backbone takes "
            f"{made[0]} and the fuser {fuser.name!r} gives {made[1]}; build the layout with tile_size and grid like "
            "that."
        )


def _tile_grid(backbone: AnyBackbone, fuser: Fuser) -> Grid:
    grids = backbone.grids()[: fuser.num_layers]
    grid, extra = fuser.out_grid(grids), sum(fuser.extra_tokens(grids))
    if grid is None or extra:
        what = "no token on" if grid is None else f"{extra} tokens of an image outside of"
        raise InputError(
            f"the fuser {fuser.name!r} puts {what} a grid, and image_layout 'anyres' puts tiles together by the cells "
            "of one; take a fuser whose tokens all lie on a grid, such as 'concat' or 'mmfuser', or image_layout "
            "'fixed'."
        )
    return grid
