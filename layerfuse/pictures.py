"""Picture files of a folder: their names, and one way to read them with one error."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import Image

from layerfuse.errors import InputError, MissingFileError
from layerfuse.preprocessing.pixels import to_rgb

__all__ = ["PICTURE_ERRORS", "PICTURE_FILES", "picture_names", "read_picture"]

PICTURE_FILES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of the files that `picture_names` takes for pictures, whatever their case."""

PICTURE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises on a file that it cannot open or decode."""


def picture_names(folder: str | Path) -> list[str]:
    """Return the picture files of a folder and the folders in it, in order: paths from the folder, with slashes.

    Hidden files and folders are left out.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there is no picture in it.
    """
    place = Path(folder)
    if not place.is_dir():
        raise MissingFileError(f"{folder} is no folder; give one with pictures ({', '.join(PICTURE_FILES)}).")
    found = (path for path in place.rglob("*") if path.suffix.lower() in PICTURE_FILES and path.is_file())
    parts = (path.relative_to(place) for path in found)
    names = sorted(part.as_posix() for part in parts if not any(each.startswith(".") for each in part.parts))
    if not names:
        raise InputError(f"{folder} holds no picture; give a folder of files that end in {', '.join(PICTURE_FILES)}.")
    return names


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture as RGB, eight bits a channel; it is not turned, but keeps the Exif data that say how to.

    Raises:
        ValueError: if it is no picture that can be read to its end and made RGB.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except PICTURE_ERRORS as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise InputError(f"picture {path} cannot be read ({reason}); give one that is whole (PNG, JPEG, …).") from error
