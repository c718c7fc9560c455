"""Image files: read as RGB, or all checked before a run that needs them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from layerfuse.errors import InputError, MissingFileError

__all__ = ["IMAGE_ERRORS", "find_broken_images", "read_image"]

IMAGE_ERRORS = (
    OSError,  # UnidentifiedImageError is one
    SyntaxError,
    ValueError,
    RuntimeError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises on a file that it cannot open or decode."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image that Pillow can read to its end.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"image {path} does not exist; give the path of a picture (PNG, JPEG, WebP, …).")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except IMAGE_ERRORS as error:
        raise InputError(
            f"image {path} cannot be read ({error}); give a picture that is whole (PNG, JPEG, WebP, …)."
        ) from error


def find_broken_images(folder: str | Path, names: Iterable[str]) -> list[str]:
    """Decode every image once, several at a time, so that a run does not meet a broken one hours later.

    Args:
        folder: what the names are relative to.
        names: of the images; one that comes twice is read once.

    Returns:
        What is wrong, one line per file that cannot be used, in the order of the names.
    """
    # Imported here so that whoever only reads an image needs no model library.
    from .data.images import image_faults

    def problem(name: str) -> str:
        faults = image_faults(Path(folder), name, how="decode")
        return next((fault.message for fault in faults if fault.is_problem), "")

    unique = list(dict.fromkeys(names))
    # Threads: Pillow decodes outside of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(problem, unique), "checking images", len(unique), unit="image", leave=False, disable=None)
        return [line for line in found if line]
