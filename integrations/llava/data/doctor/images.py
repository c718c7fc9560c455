"""Images: what is wrong with one, and which of many are broken."""

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
from ..places import ImagePlace, ImagePlaces
from .findings import Fault

__all__ = ["CheckImages", "find_broken_images", "image_faults"]

CheckImages = Literal["decode", "size", "none"]
"""Decode images, read only their headers, or do not look at them."""

_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


def image_faults(places: ImagePlaces, name: str, *, how: CheckImages, max_pixels: int | None = None) -> list[Fault]:
    """Faults of an image, at most one of them a problem.

    Args:
        places: what the name is looked up in.
        name: of the image.
        how: decode it, or read only its header.
        max_pixels: larger images are a problem; None allows what Pillow opens.
    """
    path = places / name
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return [_missing(places, name, how, max_pixels)]
    except (OSError, ValueError) as error:
        return [_fault("broken_image", name, f"cannot be read ({error})")]
    if not stat.S_ISREG(status.st_mode):
        return [_fault("missing_image", name, "missing, this is no file")]
    if status.st_size == 0:
        return [_fault("empty_image", name, "corrupt, zero bytes")]
    return list(_content_faults(path, name, how, max_pixels))


def _fault(kind: str, name: str, message: str, repair: str | None = None) -> Fault:
    return Fault(kind, f"image {printable(name)}: {message}", name, repair)


def _content_faults(path: ImagePlace, name: str, how: CheckImages, max_pixels: int | None) -> Iterator[Fault]:
    try:
        with open_image(path) as image:
            found, (width, height) = image.format or "", image.size
            if max_pixels is not None and width * height > max_pixels:
                yield _fault("large_image", name, f"{width} × {height} pixels, the limit is {max_pixels:,}")
            elif how == "decode":
                # JPEG at an eighth of its size: all bytes are read, the faults are the same, in half the time.
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
                image.load()
            turned, deep = orientation(image), is_16_bit(image)
    except FileAccessError as error:
        yield _fault("missing_image", name, str(error))
        return
    except UnreadableImageError as error:
        what = {"truncated_image": "corrupt, cut off", "broken_image": "corrupt"}.get(error.kind, "cannot be used")
        yield _fault(error.kind, name, f"{what} ({error.reason})")
        return
    if turned != 1:
        yield _fault("turned_image", name, f"is to be turned by its Exif data (orientation {turned})")
    if deep:
        yield _fault("deep_image", name, "has 16 bits a pixel, the upper eight are read")
    named = Image.registered_extensions().get(path.suffix.lower())
    if named is not None and named != {"MPO": "JPEG"}.get(found, found):
        yield _fault("mislabeled_image", name, f"called {path.suffix}, but its content is {found}")


def _missing(places: ImagePlaces, name: str, how: CheckImages, max_pixels: int | None) -> Fault:
    """Look for the same name with slashes, and with another ending: OCR-VQA's GIFs are called .jpg in LLaVA's files."""
    slashed = name.replace("\\", "/")
    stem = os.path.splitext(slashed)[0]
    names = [stem + ending for ending in (*_ENDINGS, *map(str.upper, _ENDINGS))]
    for other in names if slashed == name else [slashed, *names]:
        if not places.holds(other) or not (places / other).is_file():
            continue
        if any(fault.is_problem for fault in image_faults(places, other, how=how, max_pixels=max_pixels)):
            continue
        if slashed != name:
            message = f"written with backslashes, the file is {printable(other)}"
            return _fault("backslash_name", name, message, other)
        return _fault("wrong_extension", name, f"missing, but {os.path.basename(other)} is there", other)
    too = f"; {printable(slashed)}, with slashes, is missing, too" if slashed != name else ""
    return _fault("missing_image", name, f"missing{too}")


def find_broken_images(folder: str | Path, names: Iterable[str]) -> list[str]:
    """One line per image that cannot be used, in the order of the names; each is decoded once, several at a time.

    Args:
        folder: what the names are relative to.
        names: of the images; one that comes twice is read once.
    """

    def problem(name: str) -> str:
        faults = image_faults(ImagePlaces(folder), name, how="decode")
        return next((fault.message for fault in faults if fault.is_problem), "")

    unique = list(dict.fromkeys(names))
    # Threads: Pillow decodes outside of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(problem, unique), "checking images", len(unique), unit="image", leave=False, disable=None)
        return [line for line in found if line]
