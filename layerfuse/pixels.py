"""A PIL image of any mode, size and orientation as eight bits of red, green and blue; or the reason why not.

What Pillow's own ``convert("RGB")`` would clip or guess is done here: 16-bit values are scaled, floats are refused.
"""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

from layerfuse.errors import InputError

__all__ = ["MAX_EDGE", "check_picture", "is_16_bit", "orientation", "to_rgb", "upright"]

MAX_EDGE = 2**17
"""Longest edge in pixels: what is prepared of a longer one is a line, and takes gigabytes on the way."""

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
# What reading a damaged Exif block raises.
_EXIF_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, EOFError)


def is_16_bit(image: Image.Image) -> bool:
    """Tell whether an image has one channel of 16 bits, of which `to_rgb` keeps the upper eight."""
    return image.mode in _16_BIT or (image.mode == "I" and image.format in _16_BIT_FORMATS)


def check_picture(image: Image.Image) -> None:
    """Refuse an image whose values have no known range, or whose size is not possible; it is not decoded for that.

    Args:
        image: opened.

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
    """An image in mode RGB: alpha is dropped, grey is tripled, 16 bits are scaled to 8 (the upper eight are kept).

    Args:
        image: of any mode; the first frame of several.

    Returns:
        The RGB image; the same object if it is one already.

    Raises:
        ValueError: as `check_picture`.
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
    """Look up how an image is to be turned, by its Exif data.

    Args:
        image: opened; of one that is decoded, data that stand behind the pixels are seen, too.

    Returns:
        1 for upright, 2 to 8 as Exif numbers them; 1 where nothing, or nothing sensible, is said.
    """
    if not any(key in image.info for key in _EXIF_KEYS):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (*_EXIF_ERRORS, struct.error):
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its Exif data say; the result says nothing about turning any more.

    Args:
        image: decoded.

    Returns:
        The turned image, or the same object if there is nothing to turn.
    """
    turn = _TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key not in _EXIF_KEYS}
    return turned
