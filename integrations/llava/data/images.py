"""Image files: opening them, and finding out what is wrong with one."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from PIL import Image

from ..images import IMAGE_ERRORS
from .findings import Fault

__all__ = ["CheckImages", "image_faults"]

CheckImages = Literal["decode", "size", "none"]
"""Decode images, read only their headers, or do not look at them."""

_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


def image_faults(folder: Path, name: str, *, how: CheckImages, max_pixels: int | None = None) -> Iterator[Fault]:
    """Check an image file.

    Args:
        folder: what the name is relative to.
        name: of the image.
        how: decode it, or read only its header.
        max_pixels: larger images are a problem; None allows what Pillow opens.

    Yields:
        Its faults, at most one of them a problem.
    """
    path = folder / name
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        yield _missing(folder, name, how, max_pixels)
        return
    except (OSError, ValueError) as error:
        yield Fault("broken_image", f"image {name}: cannot be read ({error})", name)
        return
    if not stat.S_ISREG(status.st_mode):
        yield Fault("missing_image", f"image {name}: missing, this is no file", name)
    elif status.st_size == 0:
        yield Fault("empty_image", f"image {name}: corrupt, zero bytes", name)
    else:
        yield from _content_faults(path, name, how, max_pixels)


def _content_faults(path: Path, name: str, how: CheckImages, max_pixels: int | None) -> Iterator[Fault]:
    try:
        with Image.open(path) as image:
            found, (width, height) = image.format or "", image.size
            if max_pixels is None or width * height <= max_pixels:
                if how == "decode":
                    _decode(image)
            else:
                yield Fault(
                    "large_image", f"image {name}: {width} × {height} pixels, the limit is {max_pixels:,}", name
                )
    except Image.DecompressionBombError as error:
        yield Fault("large_image", f"image {name}: more pixels than Pillow opens ({error})", name)
    except IMAGE_ERRORS as error:
        cut = "truncated" in str(error).lower() or _is_short_riff(path)
        kind, what = ("truncated_image", "corrupt, cut off") if cut else ("broken_image", "corrupt")
        yield Fault(kind, f"image {name}: {what} ({error})", name)
    else:
        named = Image.registered_extensions().get(path.suffix.lower())
        if named is not None and named != {"MPO": "JPEG"}.get(found, found):
            yield Fault("mislabeled_image", f"image {name}: called {path.suffix}, but its content is {found}", name)


def _decode(image: Image.Image) -> None:
    # JPEG at an eighth of its size: all bytes are read, the faults found are the same, and it takes half the time.
    image.draft(None, (image.width // 8, image.height // 8))
    image.load()


def _is_short_riff(path: Path) -> bool:
    """Whether this is a WebP file that is shorter than it says; Pillow's message does not tell."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and len(head) == 12 and struct.unpack("<I", head[4:8])[0] + 8 > os.path.getsize(path)


def _missing(folder: Path, name: str, how: CheckImages, max_pixels: int | None) -> Fault:
    """Look for the same name with another ending: OCR-VQA's GIFs are called .jpg in LLaVA's files."""
    stem = os.path.splitext(name)[0]
    for ending in (*_ENDINGS, *map(str.upper, _ENDINGS)):
        other = stem + ending
        if not os.path.isfile(folder / other):
            continue
        if any(fault.is_problem for fault in image_faults(folder, other, how=how, max_pixels=max_pixels)):
            continue
        there = os.path.basename(other)
        return Fault("wrong_extension", f"image {name}: missing, but {there} is there", name, other)
    return Fault("missing_image", f"image {name}: missing", name)
