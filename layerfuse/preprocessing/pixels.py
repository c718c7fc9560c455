"""A PIL image of any mode, size and orientation as eight bits of red, green and blue; or the reason why not.

What Pillow's own ``convert("RGB")`` would clip or guess is done here: 16-bit values are scaled, floats are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from layerfuse.errors import InputError, InvalidTypeError

__all__ = [
    "MAX_EDGE",
    "Images",
    "Picture",
    "as_pictures",
    "check_picture",
    "image_size",
    "is_16_bit",
    "orientation",
    "to_rgb",
    "upright",
]

Picture = Image.Image | npt.NDArray[np.uint8] | torch.Tensor
# One picture, several, or a stack of them.
Images = Picture | Iterable[Picture]

MAX_EDGE = 2**17
"""Longest edge in pixels: a longer picture would be scaled to a line, and take gigabytes on the way."""

# What Pillow converts without loss of meaning; LAB and floats are not among these.
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"}
_16_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
# Pillow before 11 opens 16 bits of these formats as 32-bit integers, every Pillow the second one.
_16_BIT_FORMATS = {"PNG", "PPM"}
_ORIENTATION = 0x0112
_EXIF_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "Raw profile type xmp")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Exif's numbers of the orientations that swap height and width.
_SIDEWAYS = (5, 6, 7, 8)
# What reading a damaged Exif block raises.
_EXIF_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, EOFError)


def as_pictures(images: Images) -> list[Image.Image]:
    """Return images of any kind that `Preprocessing.batch` takes as PIL images.

    Raises:
        TypeError: if one is no picture.
        ValueError: if an array or tensor has another shape or dtype.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (np.ndarray, torch.Tensor)):
        stacked = images.ndim == 4
        return [_picture(each) for each in images] if stacked else [_picture(images)]
    if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
        raise InvalidTypeError(
            f"images are a {type(images).__name__}; give PIL images (PIL.Image.open of a file), arrays or tensors of "
            "uint8, one or several."
        )
    return [picture for each in images for picture in as_pictures(each)]


def _picture(values: npt.NDArray[np.uint8] | torch.Tensor) -> Image.Image:
    shape, dtype = tuple(values.shape), str(values.dtype).removeprefix("torch.")
    if dtype != "uint8":
        raise InputError(
            f"an image has dtype {dtype}, of which nobody can tell what is white; give uint8, 0 to 255. Tensors that "
            "are prepared already go into the encoder as they are."
        )
    if isinstance(values, torch.Tensor):
        fits, order = values.ndim == 3 and shape[0] in (1, 3), "a tensor (3, height, width)"
        pixels = values.detach().cpu().permute(1, 2, 0).numpy() if fits else None
    else:
        fits, order = values.ndim == 2 or (values.ndim == 3 and shape[2] in (1, 3)), "an array (height, width, 3)"
        pixels = values
    if pixels is None or not fits:
        raise InputError(f"an image has shape {shape}; give {order}, or several stacked along a first dimension.")
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def is_16_bit(image: Image.Image) -> bool:
    """Tell whether an image has one channel of 16 bits, of which `to_rgb` keeps the upper eight."""
    return image.mode in _16_BIT or (image.mode == "I" and image.format in _16_BIT_FORMATS)


def check_picture(image: Image.Image) -> None:
    """Refuse an image whose values have no known range, or whose size is not possible; it is not decoded for that.

    Raises:
        ValueError: saying what to do.
    """
    width, height = image.size
    if min(width, height) < 1:
        raise InputError(
            f"an image of {width}x{height} pixels (width x height) has nothing to show; look at the file or the crop "
            "that it was made from."
        )
    if max(width, height) > MAX_EDGE:
        raise InputError(
            f"the picture has {width} × {height} pixels, and no edge may be longer than {MAX_EDGE:,}; cut it or scale "
            "it down."
        )
    if image.mode not in _MODES and not is_16_bit(image):
        raise InputError(
            f"the picture's mode is {image.mode!r}, whose values have no range that could be known; scale them to "
            "0…255 and save 8 bits (Image.fromarray(array.astype('uint8')))."
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB: alpha is dropped, grey is tripled, 16 bits are scaled to 8 (the upper eight are kept).

    Of several frames the first is taken; an RGB image is returned as it is. Raises as `check_picture`.
    """
    check_picture(image)
    if image.mode == "RGB":
        image.load()
        return image
    if is_16_bit(image):
        # Pillow clips: everything above 255 would be white.
        values = np.asarray(image).astype(np.int64) >> 8
        grey = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        grey.info = dict(image.info)
        return grey.convert("RGB")
    # By way of alpha: Pillow warns when it drops a palette's transparency. The colours are the same.
    stations = {"P": "RGBA", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "HSV": "RGB", "YCbCr": "RGB"}
    return image.convert(stations.get(image.mode, "RGB")).convert("RGB")


def orientation(image: Image.Image) -> int:
    """Return the orientation of an image by its Exif data: 1 upright, also where nothing sensible is said, 2 to 8 else.

    Of an image that is decoded, data that stand behind the pixels are seen, too.
    """
    if not any(key in image.info for key in _EXIF_KEYS):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (*_EXIF_ERRORS, struct.error):
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """Return a decoded image, turned as its Exif data say and without these; or as it is if they say nothing."""
    turn = _TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key not in _EXIF_KEYS}
    return turned


def image_size(image: Image.Image, *, upright: bool) -> tuple[int, int]:
    """Return (height, width) of an image in pixels, once it is turned if ``upright``; it need not be decoded."""
    width, height = image.size
    return (width, height) if upright and orientation(image) in _SIDEWAYS else (height, width)
