"""Data files of text as sequences: a sample is parsed when it is asked for, from a memory map that processes share."""

from __future__ import annotations

import json
import mmap
from functools import partial
from pathlib import Path
from typing import Any

from layerfuse.errors import InputError, MissingFileError

from .dialects import as_sample
from .index import array_spans, has_lines, line_spans
from .samples import Sample
from .sidecar import cached_array
from .source import FileSource, UnreadableSampleError

__all__ = ["SampleFile", "read_samples"]


class SampleFile(FileSource):
    """The samples of a json or jsonl file.

    Only the place of each sample is held in memory; that of a large file's samples is kept on disk, see `sidecar`.
    Copies for worker processes share the file's pages.

    Args:
        path: one sample a line, or one JSON list. The content says which; the ending decides where it could be both.

    Attributes:
        has_lines: whether there is one sample a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, or holds no samples. Lines of a jsonl file are only read when they are asked for.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"data file {path} does not exist; give a json or jsonl file in LLaVA's format.")
        super().__init__(path, label)
        if self._state[0] == 0:
            raise InputError(f"data file {self.path} is empty; it has to hold at least one sample.")
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.has_lines = has_lines(self._data, self.path)
        find = partial(line_spans, self._data) if self.has_lines else partial(array_spans, self._data, self.path)
        self._spans = cached_array(self.path, self._state, "samples-v2", find).reshape(-1, 3)
        if not len(self._spans):
            raise InputError(f"data file {self.path} holds an empty list; it has to hold at least one sample.")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._spans)

    def _look_up(self, index: int) -> Sample:
        sample: Sample = as_sample(self.row(index))
        return sample

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


read_samples = SampleFile
"""The call by which a json or jsonl file of samples is opened."""
