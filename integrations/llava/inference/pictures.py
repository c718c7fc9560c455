"""Pictures prepared once, so that many questions about one cost its preparation once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from integrations.llava.image_layout import ImageSize

from .recent import Recent

__all__ = ["Picture", "PreparedPicture", "RecentPictures", "picture_name"]

Picture = Image.Image | str | Path
"""An image, or the path of its file."""

# 198 tiles of 336 pixels.
_MOST_BYTES = 1 << 26


def picture_name(picture: Picture) -> str | int:
    """Name a picture by its path; an image by the object that it is, so that it must not change meanwhile."""
    return id(picture) if isinstance(picture, Image.Image) else str(picture)


@dataclass(frozen=True)
class PreparedPicture:
    """A picture as the model sees it.

    Attributes:
        tiles: (tiles, C, height, width) uint8, contiguous.
        size: of the picture, height and width.
    """

    tiles: torch.Tensor
    size: ImageSize | None

    @cached_property
    def key(self) -> str:
        """A text that is another for every other picture: 32 hexadecimal digits of a hash, and the size."""
        digest = hashlib.blake2b(self.tiles.numpy().tobytes(), digest_size=16).hexdigest()
        return f"{digest} {tuple(self.tiles.shape)} {self.size}"


class RecentPictures:
    """The pictures that were prepared last, up to a number of bytes; they must not change meanwhile."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        # With the picture itself: as long as it is there, no other has its id.
        self._recent: Recent[tuple[Picture, PreparedPicture]] = Recent(most_bytes)

    def find(self, picture: Picture) -> PreparedPicture | None:
        """Return the prepared picture, if it is there."""
        found = self._recent.get(picture_name(picture))
        return None if found is None else found[1]

    def keep(self, picture: Picture, prepared: PreparedPicture) -> None:
        """Keep a prepared picture for later."""
        self._recent.put(picture_name(picture), (picture, prepared), prepared.tiles.nbytes)
