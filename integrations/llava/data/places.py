"""Where images lie, by the names that samples have: files of a folder, or inside the files that hold the samples.

Readers write `places / name` and get a `pathlib.Path`, or a `StoredImage` with the methods of one that they need. So a
member of a tar or a cell of a parquet file is opened, checked, measured and digested as a file is.
"""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from layerfuse.errors import MissingFileError

__all__ = ["ImagePlace", "ImagePlaces", "ImageStore", "StoredImage", "is_outside"]


class ImageStore(ABC):
    """A file with images inside, each of which has a name; `store / name` is a place as `folder / name` is."""

    path: Path

    @abstractmethod
    def read_image_bytes(self, name: str) -> bytes | None:
        """Content of an image; None if there is none of that name.

        Raises:
            OSError: if it cannot be read.
        """

    def __truediv__(self, name: str) -> StoredImage:
        return StoredImage(self, name)


class StoredImage:
    """An image inside a file: as much of a `pathlib.Path` as readers of images need."""

    def __init__(self, store: ImageStore, name: str) -> None:
        self.store, self.name = store, name

    @property
    def suffix(self) -> str:
        """Ending of its name."""
        return os.path.splitext(self.name)[1]

    def is_file(self) -> bool:
        """Whether it is there; what cannot be read is, and reading it says why not."""
        try:
            return self.store.read_image_bytes(self.name) is not None
        except OSError:
            return True

    def read_bytes(self) -> bytes:
        """Content; a FileNotFoundError if it is not there."""
        content = self.store.read_image_bytes(self.name)
        if content is None:
            raise MissingFileError(f"image {self} does not exist; give a name that {self.store.path} holds.")
        return content

    def open(self, mode: Literal["rb"]) -> io.BytesIO:
        """Open it for reading."""
        return _Content(self.read_bytes(), str(self))

    def stat(self) -> os.stat_result:
        """Its kind, a file, and its size in bytes; a FileNotFoundError if it is not there."""
        return os.stat_result((stat.S_IFREG, 0, 0, 0, 0, 0, len(self.read_bytes()), 0, 0, 0))

    def __str__(self) -> str:
        return f"{self.store.path}: {self.name}"


ImagePlace = Path | StoredImage
"""Where an image lies."""


class _Content(io.BytesIO):
    """Bytes that say where they are from: Pillow puts this into its errors."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name = name

    def __repr__(self) -> str:
        return repr(self._name)


class ImagePlaces:
    """A folder of images, and stores: files or folders of whose images the names begin with a label.

    Args:
        folder: what all other names are relative to.
        stores: label -> store; `label/name` is the image `name` of that store.
    """

    def __init__(self, folder: str | Path, stores: Mapping[str, ImageStore | Path] | None = None) -> None:
        self.folder, self.stores = Path(folder), dict(stores or {})

    def __truediv__(self, name: str) -> ImagePlace:
        place, own = self._find(name)
        return place / own

    def holds(self, name: str) -> bool:
        """Whether a name stays inside the folder, or the store, that it is relative to."""
        place, own = self._find(name)
        return not is_outside(own, place if isinstance(place, Path) else os.curdir)

    def __str__(self) -> str:
        return str(self.folder)

    def _find(self, name: str) -> tuple[ImageStore | Path, str]:
        slash = name.find("/") if self.stores else -1
        while slash > 0:
            if (store := self.stores.get(name[:slash])) is not None:
                return store, name[slash + 1 :]
            slash = name.find("/", slash + 1)
        return self.folder, name


def is_outside(name: str, image_folder: str | Path) -> bool:
    """Whether an image's name, as a file of samples or questions has it, leads out of the folder it is relative to."""
    if os.pardir not in name and not os.path.isabs(name):
        return False
    # By name only: folders that are links to other disks are common.
    folder = os.path.abspath(image_folder)
    return os.path.commonpath([folder, os.path.normpath(os.path.join(folder, name))]) != folder
