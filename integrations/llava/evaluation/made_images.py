"""Pictures that a benchmark keeps in a table, or that a task draws: stored once as files, beside the data.

So every image of a question is a file, and what is checked, fingerprinted, prepared by workers and looked at is one
thing for all tasks.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from layerfuse.errors import FileAccessError
from layerfuse.files import atomic_file

__all__ = ["MADE_IMAGES", "image_digest", "png_bytes", "store_image"]

MADE_IMAGES = "layerfuse_images"
"""Folder, in that of the data, of the images that are stored; it may be removed at any time."""


def store_image(folder: str | Path, name: str, content: Callable[[], bytes]) -> str:
    """Store an image file, unless it is there; return its name relative to the folder.

    Args:
        folder: of the data, as `Task.load` is given it.
        name: of the file, such as ``mmbench/241-0f6c4be2a1d3.jpg``. It has to tell apart whatever the picture depends
            on (see `image_digest`), since a file of that name is taken as it is.
        content: gives the bytes of the file.

    Raises:
        OSError: if the folder cannot be written to.
    """
    path = Path(folder) / MADE_IMAGES / name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(content())
        except OSError as error:
            raise FileAccessError(
                f"{path} cannot be written ({error.strerror or error}): pictures of this benchmark that are no files "
                "are stored there. Give a folder that can be written to; links in it to the data will do (cp -rs)."
            ) from error
    return f"{MADE_IMAGES}/{name}"


def image_digest(*parts: str | bytes) -> str:
    """12 hexadecimal digits that tell pictures apart by what they are made of."""
    joined = b"".join(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest() for part in parts)
    return hashlib.sha256(joined).hexdigest()[:12]


def png_bytes(image: Image.Image) -> bytes:
    """Write a picture as a PNG file, without loss."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
