"""Images of any number of channels (grey, multispectral, several pictures in one) as arrays of their own.

Pillow resizes each channel apart from the others, so channels go through the pipeline of RGB pictures by threes: what a
channel becomes does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.preprocessing.pixels import Images, to_rgb

__all__ = ["as_channel_arrays", "threes"]

Pixels = npt.NDArray[np.uint8]


def as_channel_arrays(images: Images, channels: int) -> list[Pixels]:
    """Return images as arrays (height, width, channels).

    Args:
        images: an array (height, width, channels) or a tensor (channels, height, width), both of uint8; of one channel
            also an array (height, width) and a PIL image, as shades of grey; several of them in any iterable, or
            stacked along a first dimension.
        channels: another number than 3.

    Raises:
        TypeError: if one is no picture.
        ValueError: if one has another number of channels or another dtype.
    """
    if isinstance(images, Image.Image):
        if channels != 1:
            raise InputError(
                f"a picture has red, green and blue, and {channels} channels are wanted; give uint8 arrays (height, "
                f"width, {channels}), or tensors ({channels}, height, width)."
            )
        return [np.asarray(to_rgb(images).convert("L"))[..., None]]
    if isinstance(images, (np.ndarray, torch.Tensor)):
        flat = isinstance(images, np.ndarray) and channels == 1 and images.ndim == 2
        return (
            [_checked(each, channels) for each in images]
            if images.ndim == 4
            else [_checked(images[..., None] if flat else images, channels)]
        )
    if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
        raise InvalidTypeError(
            f"images are a {type(images).__name__}; give arrays or tensors of uint8 with {channels} channels, one or "
            "several."
        )
    return [array for each in images for array in as_channel_arrays(each, channels)]


def threes(array: Pixels) -> list[tuple[Image.Image, list[int]]]:
    """Return an array (height, width, channels) as RGB pictures, each with the numbers of its three channels.

    The last ones are repeated to make three.
    """
    channels = array.shape[2]
    numbers = [[min(first + step, channels - 1) for step in range(3)] for first in range(0, channels, 3)]
    return [(Image.fromarray(np.ascontiguousarray(array[..., three])), three) for three in numbers]


def _checked(values: npt.NDArray[np.uint8] | torch.Tensor, channels: int) -> Pixels:
    tensor = isinstance(values, torch.Tensor)
    shape, dtype = tuple(values.shape), str(values.dtype).removeprefix("torch.")
    if len(shape) != 3 or shape[0 if tensor else 2] != channels or 0 in shape:
        form = f"a tensor ({channels}, height, width)" if tensor else f"an array (height, width, {channels})"
        raise InputError(f"an image has shape {shape}; give {form}, or several stacked along a first dimension.")
    if dtype != "uint8":
        raise InputError(
            f"an image has dtype {dtype}, of which nobody can tell what is white; give uint8, 0 to 255, or scale and "
            "normalise it yourself: floating tensors go into the encoder as they are."
        )
    return values.detach().cpu().permute(1, 2, 0).numpy() if isinstance(values, torch.Tensor) else values
