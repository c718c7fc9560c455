"""Tars of samples, as WebDataset lays them out: members with one name but for their endings are one sample.

    0001.jpg  0001.json      a sample in any form that json files may have
    0002.jpg  0002.txt       a caption

A sample's images are its members, whatever its json names, in the order of the tar. A tar is listed once; then members
are read where they lie.
"""

from __future__ import annotations

import json
import mmap
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerfuse.errors import InputError

from .dialects import as_sample, with_label
from .places import ImageStore, is_outside
from .samples import Sample, is_video
from .sidecar import cached_array
from .source import FileSource, UnreadableSampleError

__all__ = ["TarFile"]

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_TEXTS = (".json", ".txt")


class TarFile(FileSource, ImageStore):
    """The samples of a tar that is not compressed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, compressed, or holds no samples.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        super().__init__(path, label)
        self.stores = {self.label: self}
        self._names, self._spans = _unpacked(cached_array(self.path, self._state, "members-v1", self._list))
        self._twice = {name for name, count in Counter(self._names).items() if count > 1}
        self._places = {name: place for place, name in enumerate(self._names)}
        groups: dict[str, list[str]] = {}
        for name in self._places:
            # WebDataset's rule: what stands in front of the first dot of the last part of a name.
            folder, slash, last = name.rpartition("/")
            if last.lower().endswith((*_IMAGES, *_TEXTS)) or is_video(last):
                groups.setdefault(folder + slash + last.partition(".")[0], []).append(name)
        self._groups = list(groups.items())
        if not self._groups:
            raise InputError(f"data file {self.path} holds no samples; give a tar with name.jpg and name.json or .txt.")
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._groups)

    def read_image_bytes(self, name: str) -> bytes | None:
        """As of every store: content of a member."""
        place = self._places.get(name)
        return None if place is None else self._content(place)

    def _content(self, place: int) -> bytes:
        start, size = self._spans[place].tolist()
        return self._data[start : start + size]

    def place(self, index: int) -> str:
        """`sample 7 (its name)`, counted from 1."""
        return f"sample {index + 1} ({self._groups[index][0]})"

    def raw(self, index: int) -> bytes:
        """Texts, and names and sizes of images."""
        _, names = self._groups[index]
        members = [(name, int(self._spans[self._places[name], 1])) for name in names]
        texts = [self._content(self._places[name]) for name in names if name.lower().endswith(_TEXTS)]
        return b"\n".join([json.dumps(members).encode(), *texts])

    def _look_up(self, index: int) -> Sample:
        key, names = self._groups[index]
        row = self._row(index, names)
        if not isinstance(row, dict):
            return row  # type: ignore[no-any-return]  # the doctor says that it is none
        images = [name for name in names if name.lower().endswith(_IMAGES)]
        row = {"id": key, **row}
        if videos := [name for name in names if is_video(name)]:
            row["video"] = videos
        if images:
            row = {name: value for name, value in row.items() if name != "image"} | {"images": images}
        sample: Sample = as_sample(row)
        return with_label(sample, self.label) if images else sample

    def _row(self, index: int, names: Sequence[str]) -> Any:
        """What a sample's json says, or its text as a caption."""

        def fault(reason: str, kind: str = "unreadable_sample") -> UnreadableSampleError:
            return UnreadableSampleError(f"{self.path}, {self.place(index)}", reason, kind)

        for name in names:
            if name in self._twice:
                raise fault(f"has two members of the name {name}")
            if is_outside(name, os.curdir):
                raise fault(f"has a member {name}, which leads out of the archive", "outside_folder")
        texts = {os.path.splitext(name.lower())[1]: name for name in names if name.lower().endswith(_TEXTS)}
        if not texts:
            raise fault(f"has {', '.join(names)} and no text: give a .json or .txt of the same name")
        row: Any = {}
        try:
            if ".txt" in texts:
                row = {"caption": self._content(self._places[texts[".txt"]]).decode("utf-8").strip()}
            if ".json" in texts:
                read = json.loads(self._content(self._places[texts[".json"]]))
                row = {**row, **read} if isinstance(read, dict) else read
        except UnicodeDecodeError as error:
            raise fault(f"has a text that is not UTF-8 ({error.reason}, byte {error.start})") from error
        except (ValueError, RecursionError) as error:
            raise fault(f"has a text that is no valid JSON: {error}", "not_json") from error
        return row

    def _list(self) -> np.ndarray:
        """Names and places of all members that are files, see `_unpacked`."""
        names, spans, size = list[str](), list[tuple[int, int]](), self._state[0]
        try:
            with tarfile.open(self.path, "r:") as opened:
                for member in opened:
                    if member.isdir():
                        continue
                    name = member.name.removeprefix("./")
                    if not member.isreg():
                        raise InputError(f"data file {self.path} has a member {name} that is a link; store the file.")
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    if not name.rpartition("/")[2].startswith("."):  # what macOS and editors leave
                        names.append(name)
                        spans.append((member.offset_data, member.size))
        except tarfile.TarError as error:
            behind = f" behind its member {names[-1]}" if names else ""
            raise InputError(
                f"data file {self.path} is no whole tar{behind} ({error}); get it anew, and unpack .gz and the like, "
                "in which no member can be found."
            ) from error
        text = "\0".join(names).encode("utf-8", "surrogateescape")
        head = np.array([len(names), len(text)], dtype=np.int64)
        return np.concatenate(
            [head, np.array(spans, np.int64).reshape(-1), np.frombuffer(text + bytes(-len(text) % 8), np.int64)]
        )


def _unpacked(values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of members, and (N, 2) first byte and size of each."""
    count, length = values[:2].tolist()
    text = values[2 + 2 * count :].tobytes()[:length].decode("utf-8", "surrogateescape")
    return text.split("\0") if count else [], values[2 : 2 + 2 * count].reshape(-1, 2)
