"""Data files of text as sequences: a sample is parsed when it is asked for, from a memory map that processes share."""

from __future__ import annotations

import codecs
import csv
import io
import json
import mmap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from layerfuse.errors import InputError, MissingFileError

from .dialects import FORM_KEYS, as_sample, with_label
from .index import array_spans, has_lines, line_spans
from .samples import Sample
from .sidecar import cached_array
from .source import FileSource, UnreadableSampleError

__all__ = ["SampleFile", "TextTable"]

_NEEDED_CELLS = ("image", "question", "answer", "caption")


class SampleFile(FileSource):
    """The samples of a json or jsonl file.

    Only the place of each sample is held in memory; that of a large file's samples is kept on disk, see `sidecar`.
    Copies for worker processes share the file's pages.

    Args:
        path: one sample a line, or one JSON list. The content says which; the ending decides where it could be both.
        label: what messages call it; None takes the file's name.
        images: folder that its images' names are relative to; None for the image folder that is given with it.

    Attributes:
        has_lines: whether there is one sample a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, or holds no samples. Lines of a jsonl file are only read when they are asked for.
    """

    def __init__(self, path: str | Path, label: str | None = None, images: Path | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"data file {path} does not exist; give a json or jsonl file in LLaVA's format.")
        super().__init__(path, label)
        self.images = images
        # With the name of the file: a folder of images that another source of a mix names may be called as this one is.
        self._store = f"{self.label}/{self.path.name}"
        self.stores = {} if images is None else {self._store: images}
        if self._state[0] == 0:
            raise InputError(f"data file {self.path} is empty; it has to hold at least one sample.")
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._spans = self._find_samples().reshape(-1, 3)
        if not len(self._spans):
            raise InputError(f"data file {self.path} holds an empty list; it has to hold at least one sample.")

    def _find_samples(self) -> np.ndarray:
        self.has_lines = has_lines(self._data, self.path)
        find = partial(line_spans, self._data) if self.has_lines else partial(array_spans, self._data, self.path)
        return cached_array(self.path, self._state, "samples-v2", find)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._spans)

    def _look_up(self, index: int) -> Sample:
        sample: Sample = as_sample(self.row(index))
        return sample if self.images is None else with_label(sample, self._store)

    def row(self, index: int) -> Any:
        """An entry of the file, whatever it is.

        Raises:
            UnreadableSampleError: a ValueError, if it is not JSON.
        """
        try:
            return json.loads(self.raw(index))
        except (ValueError, RecursionError) as error:  # nested too deep is the second
            raise UnreadableSampleError(
                f"{self.path}, {self.place(index)}", f"is not valid JSON: {error}", "not_json"
            ) from error

    def raw(self, index: int) -> bytes:
        """A sample as it is written in the file."""
        start, end, _ = self._spans[index].tolist()
        return self._data[start:end]

    def place(self, index: int) -> str:
        """Where a sample stands: `line 7` of a jsonl file, `entry 7` of a list, counted from 1."""
        return f"{'line' if self.has_lines else 'entry'} {self._spans[index, 2]}"

    def _copy(self) -> tuple[Any, ...]:
        return self.path, self.label, self.images


class TextTable(SampleFile):
    """The samples of a csv or tsv file: columns image, question and answer, or image and caption, and others at will.

    Its first row names the columns; a cell with a line break, a separator or quotes stands in quotes.
    """

    def _find_samples(self) -> np.ndarray:
        self.has_lines, self._separator = True, "\t" if self.path.suffix.lower() == ".tsv" else ","
        spans = cached_array(self.path, self._state, "rows-v1", self._find_rows).reshape(-1, 3)
        self._columns = self._cells(spans[0], "line 1") if len(spans) else []
        if not any({*keys} <= {*self._columns} for keys in FORM_KEYS[2:]):
            raise InputError(
                f"data file {self.path} has the columns {', '.join(self._columns) or 'none'}; its first line has to "
                "name question and answer, or caption, and image."
            )
        return spans[1:]

    def _find_rows(self) -> np.ndarray:
        ends, rows = [len(codecs.BOM_UTF8) if self._data[:3] == codecs.BOM_UTF8 else 0], list[tuple[int, int, int]]()

        def lines() -> Iterator[str]:
            while ends[-1] < len(self._data):
                start, end = ends[-1], self._data.find(b"\n", ends[-1]) + 1
                ends.append(end or len(self._data))
                yield self._data[start : ends[-1]].decode("utf-8", "surrogateescape")

        first, reader = 0, csv.reader(lines(), delimiter=self._separator, strict=True)
        try:
            for cells in reader:
                if cells:
                    rows.append((ends[first], ends[reader.line_num], first + 1))
                first = reader.line_num
        except csv.Error as error:
            raise InputError(
                f"data file {self.path}, line {first + 1} is no row of a table ({error}); put a cell with quotes, line "
                'breaks or separators into quotes, and write a quote in it twice ("").'
            ) from error
        return np.array(rows, dtype=np.int64)

    def row(self, index: int) -> Any:
        """A row as a mapping; a cell without text in any column but image and answer is none."""
        cells = self._cells(self._spans[index], self.place(index))
        if len(cells) != len(self._columns):
            raise UnreadableSampleError(
                f"{self.path}, {self.place(index)}",
                f"has {len(cells)} cells, and there are {len(self._columns)} columns",
            )
        row = zip(self._columns, cells, strict=True)
        return {column: cell for column, cell in row if cell or column in _NEEDED_CELLS}

    def _cells(self, span: np.ndarray, place: str) -> list[str]:
        start, end, _ = span.tolist()
        try:
            text = self._data[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnreadableSampleError(f"{self.path}, {place}", f"is not UTF-8 ({error.reason})") from error
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._separator))
