"""Facts that a family states about a model, and the image sizes and patch grids that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerfuse.errors import InputError
from layerfuse.features import Grid
from layerfuse.preprocessing import Preprocessing

__all__ = ["BackboneFacts", "as_pair", "checked_multiple", "grid_of"]


@dataclass(frozen=True)
class BackboneFacts:
    """Facts about a model that the base class of backbones needs.

    Args:
        blocks: dotted path of the block list inside the model.
        embed_dim: C, width of the blocks.
        num_prefix_tokens: P, class and register tokens before the patch tokens.
        patch_size: (height, width) of a patch, in pixels.
        image_size: native (height, width), in pixels.
        any_size: whether every multiple of the patch size can be taken, not only the native size.
        preprocessing: of the pretrained model.
        in_channels: of the images; if None, those of the patch embedding where it is a convolution, else 3.
        tail: paths of modules after the blocks (final norm, head) that become ``nn.Identity``: no cost, no parameter.
    """

    blocks: str
    embed_dim: int
    num_prefix_tokens: int
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    any_size: bool
    preprocessing: Preprocessing
    in_channels: int | None = None
    tail: tuple[str, ...] = ()


def grid_of(size: tuple[int, int], patch_size: tuple[int, int], *, native: tuple[int, int], any_size: bool) -> Grid:
    """Return the grid (H, W), in patches, of an image of a size in pixels, for a model that was built for ``native``.

    Raises:
        ValueError: if the model cannot take that size.
    """
    height, width = size
    patch_height, patch_width = patch_size
    patches = f"{patch_height}x{patch_width} pixels"
    if (height, width) != native and not any_size:
        raise InputError(
            f"images of {height}x{width} pixels do not fit: this backbone (patches of {patches}) takes only "
            f"{native[0]}x{native[1]}; prepare them with backbone.preprocessing, or build the backbone with "
            f"image_size=({height}, {width}) if the model can be resized."
        )
    # The native size may leave a rest that the patch embedding drops: 384 pixels are 27 patches of 14 (SigLIP).
    if (height, width) != native and (nearest := _nearest(size, patch_size)) != (height, width):
        raise InputError(
            f"images of {height}x{width} pixels do not fit: this backbone takes multiples of its patch size "
            f"{patches} (natively {native[0]}x{native[1]}); the nearest is {nearest[0]}x{nearest[1]}. Prepare them "
            "with backbone.preprocessing, or resize them."
        )
    return height // patch_height, width // patch_width


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return a size, given as one edge or as (height, width) in pixels, as (height, width).

    Raises:
        ValueError: if there are more or fewer than two numbers, or one is not positive.
    """
    pair = (size, size) if isinstance(size, int) else tuple(int(edge) for edge in size)
    if len(pair) != 2 or min(pair) < 1:
        raise InputError(f"size {size!r} is no size in pixels; give one edge, or (height, width), each >= 1.")
    return pair[0], pair[1]


def checked_multiple(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return a size that a model is to be resized to, if it is a multiple of the patch size; both are (height, width).

    Raises:
        ValueError: if it is no multiple; the message gives the nearest one.
    """
    nearest = _nearest(image_size, patch_size)
    if nearest != image_size:
        raise InputError(
            f"image_size {image_size[0]}x{image_size[1]} is no multiple of the patch size "
            f"{patch_size[0]}x{patch_size[1]}; take for example {nearest[0]}x{nearest[1]}."
        )
    return image_size


def _nearest(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    height, width = (max(1, round(edge / patch)) * patch for edge, patch in zip(image_size, patch_size, strict=True))
    return height, width
