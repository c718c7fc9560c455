"""Parquet and arrow files as samples, images inside: a row is a sample, read when it is asked for.

Arrow files, such as `Dataset.save_to_disk` of Hugging Face's datasets writes, are memory maps. Of a parquet file whole
row groups are read, and the last ones are kept: `datasets` writes 100 rows of images a group.
"""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from layerfuse.errors import FileAccessError, InputError, MissingPackageError

from .dialects import FORM_KEYS, as_sample, with_label
from .places import ImageStore
from .samples import Sample, is_media_key
from .sidecar import cached_array
from .source import FileSource, UnreadableSampleError

__all__ = ["TableFile"]

_log = logging.getLogger(__name__)

# Bytes of row groups that a process keeps; the last one is kept whatever it takes.
_KEEP = 2**28
_OTHER_COLUMNS = ("id", "system")


class TableFile(FileSource, ImageStore):
    """The samples of a parquet or arrow file.

    Columns are the keys of a sample in any form that json files may have. A column `image`, or `images` of lists, holds
    names, or the images themselves: bytes, or Hugging Face's {"bytes": …, "path": …}. An image inside is named by its
    row and its number there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or lacks columns.
        ImportError: if pyarrow is not installed.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        super().__init__(path, label)
        with self._whole():
            self._table = _open_table(self.path)
        if not self._table.num_rows:
            raise InputError(f"data file {self.path} holds no rows; it has to hold at least one sample.")
        names = self._table.schema.names
        if not any({*keys} <= {*names} for keys in FORM_KEYS):
            needed = ", or ".join(" and ".join(keys) for keys in FORM_KEYS)
            raise InputError(f"data file {self.path} has the columns {', '.join(names)}; it needs {needed}.")
        with self._whole():
            self._images = _image_column(self._table, self.path)
        wanted = {key for keys in FORM_KEYS for key in keys} | {*_OTHER_COLUMNS, "image", "images"}
        inside = None if self._images is None else self._images.name
        self._texts = tuple(name for name in names if name != inside and (name in wanted or is_media_key(name)))
        if self._images is not None:
            self.stores = {self.label: self}
            with self._whole():
                self._counts = cached_array(self.path, self._state, "images-v1", self._count_images)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Say which file it is that pyarrow cannot read."""
        try:
            yield
        except (InputError, MissingPackageError):
            raise
        except (OSError, ValueError) as error:  # pyarrow's are one or the other
            raise InputError(
                f"data file {self.path} is no whole parquet or arrow file ({_said(error)}); write or download it anew."
            ) from error

    def __len__(self) -> int:
        """Number of rows."""
        return self._table.num_rows

    def _row(self, index: int) -> dict[str, Any]:
        """A row; images inside are names, without label."""
        try:
            row = self._table.row(self._texts, index)
        except (OSError, ValueError) as error:
            place = f"{self.path}, {self.place(index)}"
            raise UnreadableSampleError(place, f"cannot be read ({_said(error)})") from error
        if self._images is not None:
            names = [f"{index}-{number}" for number in range(self._counts[index])]
            row[self._images.name] = names if self._images.is_list else names[0] if names else None
        return row

    def _look_up(self, index: int) -> Sample:
        sample = as_sample(self._row(index))
        return with_label(sample, self.label) if self._images is not None else sample  # type: ignore[no-any-return]

    def raw(self, index: int) -> bytes:
        """Texts and names of a row and, for images inside, which are not read for this, the size of the file."""
        size = self._state[0] if self._images is not None else None
        return json.dumps([size, self._row(index)], default=str).encode()

    def place(self, index: int) -> str:
        """`row 7`, counted from 1."""
        return f"row {index + 1}"

    def read_image_bytes(self, name: str) -> bytes | None:
        """As of every store; an empty cell is an image of zero bytes."""
        found = re.fullmatch(r"(\d+)-(\d+)", name)
        if self._images is None or found is None:
            return None
        row, number = map(int, found.groups())
        if row >= len(self) or number >= self._counts[row]:
            return None
        try:
            cell = self._table.row((self._images.name,), row)[self._images.name]
        except (OSError, ValueError) as error:
            raise FileAccessError(
                f"{self.path}, {self.place(row)} cannot be read ({_said(error)}); get it anew."
            ) from error
        cell = cell[number] if self._images.is_list else cell
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        return content or b""

    def _count_images(self) -> np.ndarray:
        assert self._images is not None
        column = self._images
        return np.concatenate([column.counts(chunk.column(column.name)) for chunk in self._table.chunks(column.small)])


@dataclass(frozen=True)
class _ImageColumn:
    """A column of images: its name, whether a cell holds several, and what of it is enough to count them."""

    name: str
    is_list: bool
    small: str

    def counts(self, column: Any) -> np.ndarray:
        """Images in each cell."""
        from pyarrow import compute

        found = compute.fill_null(compute.list_value_length(column), 0) if self.is_list else compute.is_valid(column)
        return np.asarray(found.to_numpy(), dtype=np.int64)


def _image_column(table: _Table, path: Path) -> _ImageColumn | None:
    """The column with images inside, if there is one; a ValueError if it is not clear which, or how it is called."""
    inside = []
    for field in table.schema:
        is_list = hasattr(field.type, "value_field")
        kind = field.type.value_type if is_list else field.type
        parts = [kind.field(position).name for position in range(kind.num_fields)]
        if not (str(kind) in ("binary", "large_binary") or "bytes" in parts):
            continue
        if "bytes" in parts and (str(kind.field("bytes").type) == "null" or table.is_empty(field.name, "bytes")):
            continue  # these are names: {"bytes": None, "path": name}
        small = table.leaf(field.name, "path") if "path" in parts else field.name
        inside.append(_ImageColumn(field.name, is_list, small))
    if any(column.name not in ("image", "images") for column in inside) or len(inside) > 1:
        names = ", ".join(column.name for column in inside)
        raise InputError(
            f"data file {path} holds bytes in {names}; a sample's images stand in one column, image or images. Rename "
            "it, or leave the others out."
        )
    return inside[0] if inside else None


class _Table(ABC):
    """Rows of a file by their index."""

    schema: Any
    num_rows: int

    @abstractmethod
    def row(self, columns: Sequence[str], index: int) -> dict[str, Any]:
        """Some columns of a row."""

    @abstractmethod
    def chunks(self, column: str) -> Iterator[Any]:
        """Tables with one column, or a leaf of it, that are all rows together."""

    @abstractmethod
    def is_empty(self, column: str, part: str) -> bool:
        """Whether a part of a column is null in every row."""

    @abstractmethod
    def leaf(self, column: str, part: str) -> str:
        """Name of a part of a column, for `chunks`."""


class _Arrow(_Table):
    def __init__(self, path: Path, *, stream: bool) -> None:
        import pyarrow

        source = pyarrow.memory_map(str(path))
        opened = pyarrow.ipc.open_stream(source) if stream else pyarrow.ipc.open_file(source)
        self.table = opened.read_all()
        self.schema, self.num_rows = self.table.schema, self.table.num_rows

    def row(self, columns: Sequence[str], index: int) -> dict[str, Any]:
        found: dict[str, Any] = self.table.select(columns).slice(index, 1).to_pylist()[0]
        return found

    def chunks(self, column: str) -> Iterator[Any]:
        yield self.table.select([column])

    def is_empty(self, column: str, part: str) -> bool:
        chunks = self.table.column(column).chunks
        flat = [chunk.flatten() if hasattr(chunk, "values") else chunk for chunk in chunks]
        return all(chunk.field(part).null_count == len(chunk) for chunk in flat)

    def leaf(self, column: str, part: str) -> str:
        return column  # nothing is read but what says which cells there are


class _Parquet(_Table):
    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        # A memory map has no place that forked processes would share.
        self.file = parquet.ParquetFile(path, memory_map=True)
        self.schema, meta = self.file.schema_arrow, self.file.metadata
        self.num_rows: int = meta.num_rows
        groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        self._kept: OrderedDict[tuple[Sequence[str], int], Any] = OrderedDict()
        if (largest := max((group.total_byte_size for group in groups), default=0)) > _KEEP:
            _log.warning(
                "data file %s has row groups of up to %.1f GiB, and each row is read with its group; write smaller "
                "ones (row_group_size=100), or convert it (data convert)",
                path,
                largest / 2**30,
            )

    def row(self, columns: Sequence[str], index: int) -> dict[str, Any]:
        group = bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        found: dict[str, Any] = self._group(columns, group).slice(index - start, 1).to_pylist()[0]
        return found

    def _group(self, columns: Sequence[str], group: int) -> Any:
        key = (tuple(columns), group)
        table = self._kept.pop(key, None)
        if table is None:
            table = self.file.read_row_group(group, columns=list(columns), use_threads=False)
            while self._kept and sum(own.nbytes for own in self._kept.values()) + table.nbytes > _KEEP:
                self._kept.popitem(last=False)
        self._kept[key] = table
        return table

    def chunks(self, column: str) -> Iterator[Any]:
        for group in range(len(self._ends)):
            yield self.file.read_row_group(group, columns=[column], use_threads=False)

    def is_empty(self, column: str, part: str) -> bool:
        place = next(place for place in range(len(self.file.schema)) if self._is(place, column, part))
        chunks = [self.file.metadata.row_group(number).column(place) for number in range(len(self._ends))]
        counts = [(chunk.statistics, chunk.num_values) for chunk in chunks]
        return all(known is not None and known.has_null_count and known.null_count == n for known, n in counts)

    def leaf(self, column: str, part: str) -> str:
        places = range(len(self.file.schema))
        path: str = next(self.file.schema.column(place).path for place in places if self._is(place, column, part))
        return path

    def _is(self, place: int, column: str, part: str) -> bool:
        steps = self.file.schema.column(place).path.split(".")
        return bool(steps[0] == column and steps[-1] == part)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())


def _open_table(path: Path) -> _Table:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path} needs pyarrow, which is not installed; `pip install layerfuse[parquet]`."
        ) from error
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:4] == b"PAR1":
        return _Parquet(path)
    return _Arrow(path, stream=magic != b"ARROW1")
