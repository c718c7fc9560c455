"""Checks of the images that a backbone is given and of the hidden states that its blocks return."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from layerfuse._block_stages import Blocks
from layerfuse.backbones._stages import Stage
from layerfuse.errors import InputError, InvalidTypeError, TapError
from layerfuse.features import Grid
from layerfuse.preprocessing import holds_patches

__all__ = ["check_images", "check_tokens", "find_patch_embedding"]


_DROPPED = (
    "tokens were dropped on the way, so what is left lies on no grid: by patch dropout, which eval mode or a rate of 0 "
    "turns off (timm: patch_drop_rate, open_clip: patch_dropout), by the masks of masked pretraining (MAE: load the "
    "weights into a plain Vision Transformer), or by merging or pruning."
)


def find_patch_embedding(model: nn.Module, blocks: Blocks, patch_size: tuple[int, int]) -> tuple[str, int | None]:
    """Return the path of the module that the images meet first, and the image channels that it takes.

    It does not lie in a block. The path is that of the model itself, ``""``, if none is found; channels are
    known of a convolution, else None.
    """
    outside = [(path, module) for path, module in model.named_modules() if not blocks.hold(path)]
    convolutions = [(path, module) for path, module in outside if isinstance(module, nn.Conv2d)]
    for path, module in convolutions:
        if module.kernel_size == module.stride == tuple(patch_size):
            return path, module.in_channels
    if convolutions:
        return convolutions[0][0], convolutions[0][1].in_channels
    return next((path for path, module in outside if isinstance(module, nn.Linear)), ""), None


def check_images(images: object, in_channels: int, *, takes_patches: bool = False) -> None:
    """Raise InvalidTypeError or InputError unless images are one floating tensor (B, in_channels, height, width)."""
    expected = f"expected (B, {in_channels}, height, width)"
    if not isinstance(images, torch.Tensor):
        if holds_patches(images):
            raise InvalidTypeError(
                f"images are patches; {expected} as one tensor: patches are for one backbone that takes them (NaFlex)."
            )
        advice = "prepare pictures with backbone.prepare(pictures)"
        if isinstance(images, Mapping):
            names = ", ".join(map(repr, images)) or "nothing"
            advice = f"of a processor's output (it holds {names}) pass the pixel values alone"
        elif isinstance(images, (list, tuple)) and images and all(isinstance(image, torch.Tensor) for image in images):
            advice = "join tensors of one size with torch.stack(images)"
        raise InvalidTypeError(f"images are a {type(images).__name__}; {expected} as one tensor: {advice}.")
    shape = tuple(images.shape)
    if len(shape) == 3 and takes_patches and shape[0] != in_channels:
        raise InputError(
            f"images have shape {shape}: patches without their grids; give the whole output of the processor, not its "
            "pixel values alone."
        )
    if len(shape) == 3:
        raise InputError(f"images have shape {shape}; {expected}: give one image as images[None], a batch of one.")
    if len(shape) != 4 or shape[1] != in_channels:
        order = "RGB, channels before height" if in_channels == 3 else "as many channels as the patch embedding takes"
        raise InputError(f"images have shape {shape}; {expected}: {order}, as backbone.prepare makes them of pictures.")
    if 0 in shape:
        raise InputError(
            f"images have shape {shape}, which holds no pixel; leave an empty batch out, or look at the pictures or "
            "crops that it was made from."
        )
    if not images.is_floating_point():
        raise InputError(
            f"images have dtype {images.dtype}; expected a floating dtype: prepare pictures with backbone.prepare."
        )


def check_tokens(
    layer: int, states: torch.Tensor, stage: Stage, *, num_images: int, num_prefix_tokens: int, grid: Grid
) -> None:
    """Raise TapError unless a layer put out the shape that its stage has; it says what the shape points to."""
    expected = stage.shape(num_images, num_prefix_tokens, grid)
    if states.shape != expected:
        letters = "B, P + H * W, C" if stage.layout == "NLC" else ", ".join(stage.layout.replace("N", "B"))
        raise TapError(
            f"layer {layer} put out a tensor of shape {tuple(states.shape)}; expected ({letters}) = {expected} for "
            f"{num_prefix_tokens} prefix tokens, a grid of {grid[0]}x{grid[1]} patches and width {stage.embed_dim}. "
            f"{_explain(tuple(states.shape), expected, grid[0] * grid[1])}"
        )


def _explain(shape: tuple[int, ...], expected: tuple[int, ...], num_patches: int) -> str:
    if len(expected) != 3:
        return "Check layout, embed_dim and stride of the stage."
    if len(shape) != 3:
        return (
            "The blocks do not work on (B, tokens, C): if they do on (B, H, W, C) or (B, C, H, W), say so with "
            "layout='NHWC' or 'NCHW'; else layerfuse cannot tap them."
        )
    num_images, num_tokens, embed_dim = expected
    if shape == (num_tokens, num_images, embed_dim):
        return "The blocks take (tokens, B, C): build the model with batch_first=True, or transpose inside its blocks."
    if shape[0] != num_images:
        return "The blocks do not see the batch as it was given (windows, crops): layerfuse cannot tap them."
    if shape[2] != embed_dim:
        return "Check embed_dim, the width of the blocks."
    if shape[1] == num_patches:
        return (
            "These are the patches alone: the class token joins later (as in CaiT, XCiT, and ConViT until its last "
            f"blocks). Tap such layers as ModuleBackbone(model, num_prefix_tokens=0, ...). Or {_DROPPED}"
        )
    if shape[1] < num_patches:
        return _DROPPED[0].upper() + _DROPPED[1:]
    if shape[1] < num_tokens:
        return f"Check num_prefix_tokens. Or {_DROPPED}"
    return "Check num_prefix_tokens and patch_size."
