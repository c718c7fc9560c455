"""Data files as sequences: a sample is parsed when it is asked for, from a memory map that all processes share."""

from __future__ import annotations

import json
import mmap
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any, overload

import numpy as np

from layerfuse.errors import InputError, MissingFileError

from .index import array_spans, has_lines, line_spans
from .samples import Sample, count_words
from .sidecar import FileState, cached_array, file_state

__all__ = ["SampleFile", "Selection", "file_index", "read_samples", "sample_lengths", "select_samples"]


class _Samples(Sequence[Sample]):
    """A sequence that looks up one sample at a time; a slice of it is a list."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Look a sample up, or a list of several.

        Raises:
            IndexError: if there are not so many.
            ValueError: if a line is not JSON; its number is named.
        """
        if isinstance(index, slice):
            return [self._look_up(position) for position in range(*index.indices(len(self)))]
        return self._look_up(index)

    @abstractmethod
    def _look_up(self, index: int) -> Sample: ...


class SampleFile(_Samples):
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

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingFileError(
                f"data file {self.path} does not exist; give a json or jsonl file in LLaVA's format."
            )
        self._state = file_state(self.path)
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
        try:
            sample: Sample = json.loads(self.raw(index))
        except (ValueError, RecursionError) as error:  # nested too deep is the second
            raise InputError(f"data file {self.path}, {self.place(index)} is not valid JSON: {error}.") from error
        return sample

    def __eq__(self, other: object) -> bool:
        """Whether the other is a sequence of the same samples."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def raw(self, index: int) -> bytes:
        """A sample as it is written in the file."""
        start, end, _ = self._spans[index].tolist()
        return self._data[start:end]

    def place(self, index: int) -> str:
        """Where a sample stands: `line 7` of a jsonl file, `entry 7` of a list, counted from 1."""
        return f"{'line' if self.has_lines else 'entry'} {self._spans[index, 2]}"

    @property
    def lengths(self) -> np.ndarray:
        """`count_words` of every sample, (N,) int64; 0 for what is no sample. Counted once and kept beside the file."""
        return cached_array(self.path, self._state, "words-v2", self._count)

    def _count(self) -> np.ndarray:
        counts = np.zeros(len(self), dtype=np.int64)
        for index in range(len(self)):
            with suppress(ValueError, RecursionError):
                counts[index] = count_words(json.loads(self.raw(index)))
        return counts

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._state)


def _reopen(path: Path, state: FileState) -> SampleFile:
    """Open a file in another process, which must see the same samples."""
    samples = SampleFile(path)
    if samples._state != state:
        raise InputError(f"data file {path} was changed while it is in use; leave it alone until the run has ended.")
    return samples


class Selection(_Samples):
    """The samples of a sequence that stand at some indices, in the order of the indices."""

    def __init__(self, samples: Sequence[Sample], indices: Sequence[int] | np.ndarray) -> None:
        self.samples = samples
        self.indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        """Number of samples selected."""
        return len(self.indices)

    def _look_up(self, index: int) -> Sample:
        return self.samples[int(self.indices[index])]


read_samples = SampleFile
"""The call by which a json or jsonl file of samples is opened."""


def select_samples(samples: Sequence[Sample], indices: Sequence[int] | np.ndarray) -> Sequence[Sample]:
    """Take some samples, in the order of the indices; if that is all of them, they are returned as they are."""
    return samples if np.array_equal(indices, np.arange(len(samples))) else Selection(samples, indices)


def file_index(samples: Sequence[Sample], index: int) -> int:
    """Index that a sample has in its file, whatever was selected from it."""
    return file_index(samples.samples, int(samples.indices[index])) if isinstance(samples, Selection) else index


def sample_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """`count_words` of every sample, (N,) int64; read from beside the data file, where there is one."""
    if isinstance(samples, Selection):
        return sample_lengths(samples.samples)[samples.indices]
    if isinstance(samples, SampleFile):
        return samples.lengths
    return np.array([count_words(sample) for sample in samples], dtype=np.int64)
