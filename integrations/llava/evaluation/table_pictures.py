"""Pictures in the cells of a published table, stored as files."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from layerfuse.errors import InputError

from .made_images import image_digest, store_image

__all__ = ["decoded_picture", "stored_picture", "table_picture"]

_ENDINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}


def table_picture(value: Any, place: str) -> bytes:
    """The bytes of a picture in a cell of a parquet file: ``{"bytes": …}`` as the Hugging Face hub has it, or bytes.

    Raises:
        ValueError: naming the place, if the cell holds none.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes) or not content:
        raise InputError(f"{place} holds no picture in its cell; give the published file, pictures within.")
    return content


def decoded_picture(text: str, place: str) -> bytes:
    """The bytes of a picture that a table holds in base64.

    Raises:
        ValueError: naming the place, if it is none.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{place} holds no picture in base64 ({error}); get the file anew.") from error
    if not content:
        raise InputError(f"{place} holds no picture in base64; get the file anew.")
    return content


def stored_picture(folder: str | Path, benchmark: str, content: bytes) -> str:
    """Store a picture under a name that its content gives, once however many questions show it; return the name."""
    ending = next((ending for start, ending in _ENDINGS.items() if content.startswith(start)), "img")
    return store_image(folder, f"{benchmark}/{image_digest(content)}.{ending}", lambda: content)
