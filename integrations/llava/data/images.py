"""Images, wherever they lie: one way to open them and one error for doctor, training and inference."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image

from integrations.llava._text import printable
from integrations.llava.image_layout import ImageSize
from layerfuse.errors import InputError, MissingFileError, UserError
from layerfuse.pictures import PICTURE_ERRORS
from layerfuse.preprocessing.pixels import MAX_EDGE, check_picture, image_size, to_rgb

from .places import ImagePlace, StoredImage

__all__ = ["UnreadableImageError", "open_image", "read_image", "read_image_size"]

# A process that has no room for a picture of fewer pixels is short of memory; that is no fault of the picture.
_LARGE = 2**24

Reason = Literal["large_image", "unclear_values", "truncated_image", "broken_image"]


class UnreadableImageError(InputError):
    """An image file that cannot be used: its kind of fault, as the data doctor names it, and the reason in words."""

    def __init__(self, path: ImagePlace, kind: Reason, reason: str) -> None:
        way_out = "give a picture that is whole (PNG, JPEG, WebP, …)." if kind.endswith("n_image") else ""
        self.kind: Reason = kind
        self.reason = reason.rstrip(".")
        super().__init__(f"image {printable(str(path))} cannot be read ({self.reason}); {way_out}".rstrip("; "))


@contextmanager
def open_image(path: str | ImagePlace) -> Iterator[Image.Image]:
    """Open an image, whatever its ending; it is decoded when its pixels are asked for inside the block.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableImageError: if the file is at fault for what goes wrong on opening it and inside the block.
    """
    path = path if isinstance(path, StoredImage) else Path(path)
    try:
        is_file = path.is_file()
    except ValueError:  # a name that no file can have
        is_file = False
    if not is_file:
        raise MissingFileError(
            f"image {printable(str(path))} does not exist; give the path of a picture (PNG, JPEG, WebP, …)."
        )
    num_pixels = 0
    try:
        with Image.open(path if isinstance(path, Path) else path.open("rb")) as image:
            num_pixels = image.width * image.height
            _check(path, image)
            yield image
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(path, "large_image", f"more pixels than Pillow opens: {error}") from error
    except MemoryError as error:
        if num_pixels < _LARGE:
            raise
        raise UnreadableImageError(path, "large_image", f"no memory for its {num_pixels:,} pixels") from error
    except PICTURE_ERRORS as error:
        cut = "truncated" in str(error).lower() or _is_short_riff(path)
        what = str(error) or type(error).__name__
        raise UnreadableImageError(path, "truncated_image" if cut else "broken_image", what) from error


def read_image(path: str | ImagePlace) -> Image.Image:
    """Read an image as RGB, eight bits a channel; it is not turned, but keeps the Exif data that say how to.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableImageError: a ValueError, if it is not an image that can be read to its end and made RGB.
    """
    with open_image(path) as image:
        return to_rgb(image)


def read_image_size(path: str | ImagePlace, *, upright: bool) -> ImageSize | None:
    """Height and width of an image in pixels, from the head of its file; None where that cannot be read.

    Args:
        path: where it lies.
        upright: whether the image will be turned as its Exif data say.
    """
    try:
        with open_image(path) as image:
            return image_size(image, upright=upright)
    except UserError:
        return None


def _check(path: ImagePlace, image: Image.Image) -> None:
    try:
        check_picture(image)
    except InputError as error:
        sized = min(image.size) > 0
        is_long = max(image.size) > MAX_EDGE
        kind: Reason = "broken_image" if not sized else "large_image" if is_long else "unclear_values"
        raise UnreadableImageError(path, kind, str(error)) from error


def _is_short_riff(path: ImagePlace) -> bool:
    """Whether this is a WebP file that is shorter than it says; Pillow's message does not tell."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
        return head[:4] == b"RIFF" and len(head) == 12 and struct.unpack("<I", head[4:8])[0] + 8 > path.stat().st_size
    except OSError:
        return False
