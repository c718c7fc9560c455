"""Image files: opening them, and finding out what is wrong with one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm.auto import tqdm

from integrations.llava._text import printable
from layerfuse.errors import FileAccessError
from layerfuse.preprocessing.pixels import is_16_bit, orientation

from ..images import UnreadableImageError, open_image
from ..media_names import is_outside
from .findings import Fault

__all__ = ["CheckImages", "find_broken_images", "image_faults"]

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
    path, shown = folder / name, printable(name)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        yield _missing(folder, name, how, max_pixels)
        return
    except (OSError, ValueError) as error:
        yield Fault("broken_image", f"image {shown}: cannot be read ({error})", name)
        return
    if not stat.S_ISREG(status.st_mode):
        yield Fault("missing_image", f"image {shown}: missing, this is no file", name)
    elif status.st_size == 0:
        yield Fault("empty_image", f"image {shown}: corrupt, zero bytes", name)
    else:
        yield from _content_faults(path, name, how, max_pixels)


def _content_faults(path: Path, name: str, how: CheckImages, max_pixels: int | None) -> Iterator[Fault]:
    shown = printable(name)
    try:
        with open_image(path) as image:
            found, (width, height) = image.format or "", image.size
            if max_pixels is not None and width * height > max_pixels:
                yield Fault(
                    "large_image", f"image {shown}: {width} × {height} pixels, the limit is {max_pixels:,}", name
                )
            elif how == "decode":
                _decode(image)
            turned, deep = orientation(image), is_16_bit(image)
    except FileAccessError as error:
        yield Fault("missing_image", f"image {shown}: {error}", name)
        return
    except UnreadableImageError as error:
        what = {"truncated_image": "corrupt, cut off", "broken_image": "corrupt"}.get(error.kind, "cannot be used")
        yield Fault(error.kind, f"image {shown}: {what} ({error.reason})", name)
        return
    if turned != 1:
        yield Fault("turned_image", f"image {shown}: is to be turned by its Exif data (orientation {turned})", name)
    if deep:
        yield Fault("deep_image", f"image {shown}: has 16 bits a pixel, the upper eight are read", name)
    named = Image.registered_extensions().get(path.suffix.lower())
    if named is not None and named != {"MPO": "JPEG"}.get(found, found):
        yield Fault("mislabeled_image", f"image {shown}: called {path.suffix}, but its content is {found}", name)


def _decode(image: Image.Image) -> None:
    # JPEG at an eighth of its size: all bytes are read, the faults found are the same, and it takes half the time.
    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()


def _missing(folder: Path, name: str, how: CheckImages, max_pixels: int | None) -> Fault:
    """Look for the same name with slashes, and with another ending: OCR-VQA's GIFs are called .jpg in LLaVA's files."""
    shown, slashed = printable(name), name.replace("\\", "/")
    names = [] if slashed == name else [slashed]
    stem = os.path.splitext(slashed)[0]
    names += [stem + ending for ending in (*_ENDINGS, *map(str.upper, _ENDINGS))]
    for other in names:
        if is_outside(other, folder) or not os.path.isfile(folder / other):
            continue
        if any(fault.is_problem for fault in image_faults(folder, other, how=how, max_pixels=max_pixels)):
            continue
        if slashed != name:
            message = f"image {shown}: written with backslashes, the file is {printable(other)}"
            return Fault("backslash_name", message, name, other)
        there = os.path.basename(other)
        return Fault("wrong_extension", f"image {shown}: missing, but {there} is there", name, other)
    if slashed != name:
        return Fault(
            "missing_image", f"image {shown}: missing; {printable(slashed)}, with slashes, is missing, too", name
        )
    return Fault("missing_image", f"image {shown}: missing", name)


def find_broken_images(folder: str | Path, names: Iterable[str]) -> list[str]:
    """Decode every image once, several at a time, so that a run does not meet a broken one hours later.

    Args:
        folder: what the names are relative to.
        names: of the images; one that comes twice is read once.

    Returns:
        What is wrong, one line per file that cannot be used, in the order of the names.
    """

    def problem(name: str) -> str:
        faults = image_faults(Path(folder), name, how="decode")
        return next((fault.message for fault in faults if fault.is_problem), "")

    unique = list(dict.fromkeys(names))
    # Threads: Pillow decodes outside of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(problem, unique), "checking images", len(unique), unit="image", leave=False, disable=None)
        return [line for line in found if line]
