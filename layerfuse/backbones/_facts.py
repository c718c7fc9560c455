"""Facts that a family states about a model, and the image sizes and patch grids that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerfuse.backbones._stages import Stage
from layerfuse.errors import InputError
from layerfuse.features import Grid
from layerfuse.preprocessing import PatchLayout, Preprocessing

__all__ = ["BackboneFacts", "as_pair", "checked_multiple", "grid_of"]


@dataclass(frozen=True)
class BackboneFacts:
    """Facts about a model that the base class of backbones needs.

    Args:
        blocks: dotted path of the block list inside the model; of one list in each stage with ``*`` for the number of
            the stage, ``"layers.*.blocks"``.
        embed_dim: C, width of the blocks, or of those of the first stage.
        num_prefix_tokens: P, class and register tokens before the patch tokens.
        patch_size: (height, width) of a patch, in pixels; the stride of the first stage.
        image_size: native (height, width), in pixels.
        any_size: whether every multiple of ``size_step`` can be taken, not only the native size.
        preprocessing: of the pretrained model.
        in_channels: of the images; if None, those of the patch embedding where it is a convolution, else 3.
        patch_layout: of the values in a patch, where the model also takes pictures as patches, each on its own grid
            (NaFlex); see `Backbone.run_patches`. None if it takes images alone.
        tail: paths of modules after the blocks (final norm, head) that become ``nn.Identity``: no cost, no parameter;
            ``*`` stands for the last stage that is left.
        stages: where layers have several widths or grids, or other tokens than (B, P + N, C); empty for one stage.
        returns_pairs: whether the model takes what a block returns for a pair that begins with the hidden states.
        size_step: (height, width) in pixels of which sizes must be multiples; the patch size if None.

    Raises:
        ValueError: if the first stage has another width or stride, or there are prefix tokens in maps that have none.
    """

    blocks: str
    embed_dim: int
    num_prefix_tokens: int
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    any_size: bool
    preprocessing: Preprocessing
    in_channels: int | None = None
    patch_layout: PatchLayout | None = None
    tail: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    size_step: tuple[int, int] | None = None
    returns_pairs: bool = False

    def __post_init__(self) -> None:
        first = self.stages[0] if self.stages else None
        if first is not None and (first.embed_dim, first.stride) != (self.embed_dim, self.patch_size):
            raise InputError(
                f"embed_dim={self.embed_dim} and patch_size={self.patch_size} are those of the first stage, and that "
                f"has width {first.embed_dim} and stride {first.stride}; give the same for both."
            )
        if self.num_prefix_tokens and any(stage.layout != "NLC" or stage.unrolled for stage in self.stages):
            raise InputError(
                f"num_prefix_tokens is {self.num_prefix_tokens}, and maps (B, H, W, C), (B, C, H, W) or unrolled ones "
                "have no place for prefix tokens; give 0, or the layout 'NLC'."
            )


def grid_of(
    size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    native: tuple[int, int],
    any_size: bool,
    step: tuple[int, int],
) -> Grid:
    """Return the grid (H, W), in patches, of an image of a size in pixels, for a model that was built for ``native``.

    ``step`` is what other sizes must be multiples of, in pixels.

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
    if (height, width) != native and (nearest := _nearest(size, step)) != (height, width):
        named = f"its patch size {patches}" if step == patch_size else f"{step[0]}x{step[1]} pixels"
        raise InputError(
            f"images of {height}x{width} pixels do not fit: this backbone takes multiples of {named} (natively "
            f"{native[0]}x{native[1]}); the nearest is {nearest[0]}x{nearest[1]}. Prepare them with "
            "backbone.preprocessing, or resize them."
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


def checked_multiple(image_size: tuple[int, int], facts: BackboneFacts) -> tuple[int, int]:
    """Return a size that a model is to be resized to, (height, width) in pixels, if the model can take it.

    Raises:
        ValueError: if it is no multiple of the patch size, or of ``facts.size_step``; the message gives the nearest.
    """
    step = facts.size_step or facts.patch_size
    nearest = _nearest(image_size, step)
    if nearest != image_size:
        named = f"{'the patch size ' if step == facts.patch_size else ''}{step[0]}x{step[1]}"
        raise InputError(
            f"image_size {image_size[0]}x{image_size[1]} is no multiple of {named}; take for example "
            f"{nearest[0]}x{nearest[1]}."
        )
    return image_size


def _nearest(image_size: tuple[int, int], step: tuple[int, int]) -> tuple[int, int]:
    height, width = (max(1, round(edge / pixels)) * pixels for edge, pixels in zip(image_size, step, strict=True))
    return height, width
