"""Samples as sequences, whatever they are read from: the contract of every form of data, selections and joins of them.

A form of data is a class: `SampleFile` (json, jsonl), … Training, doctor and samplers ask nothing else of it than what
`SampleSource` has.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from operator import eq
from pathlib import Path
from typing import Any, overload

import numpy as np

from layerfuse.errors import InputError, UserError

from .places import ImagePlaces, ImageStore
from .samples import Sample, count_words
from .sidecar import cached_array, file_state

__all__ = [
    "FileSource",
    "JoinedSamples",
    "SampleSource",
    "Selection",
    "UnreadableSampleError",
    "as_source",
    "drawn_evenly",
    "file_index",
    "image_places",
    "sample_lengths",
    "select_samples",
    "source_of",
]


class UnreadableSampleError(InputError):
    """A sample that cannot be read: the kind of fault, as the data doctor names it, and the reason, a verb first."""

    def __init__(self, place: str, reason: str, kind: str = "unreadable_sample") -> None:
        self.kind, self.reason = kind, reason
        super().__init__(f"data file {place} {reason}.")


class SampleSource(Sequence[Sample]):
    """Samples in LLaVA's form, looked up one at a time; a slice is a list.

    Attributes:
        label: what messages call the source; names of images inside its files begin with it.
        stores: label -> what holds images inside; none where all images lie in the image folder.
    """

    label: str = ""
    stores: Mapping[str, ImageStore | Path] = {}

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Look a sample up, or a list of several.

        Raises:
            IndexError: if there are not so many.
            UnreadableSampleError: a ValueError, if it cannot be read; its place is named.
        """
        if isinstance(index, slice):
            return [self._look_up(position) for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._look_up(index % len(self))

    def __eq__(self, other: object) -> bool:
        """Whether the other is a sequence of the same samples."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    @abstractmethod
    def _look_up(self, index: int) -> Sample: ...

    @abstractmethod
    def raw(self, index: int) -> bytes:
        """What tells a sample from another one or an edited one: its bytes in a file of text."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Where a sample stands, such as `line 7`, counted from 1."""

    @property
    def lengths(self) -> np.ndarray:
        """`count_words` of every sample, (N,) int64; 0 for what is no sample."""
        return self._count()

    def _count(self) -> np.ndarray:
        counts = np.zeros(len(self), dtype=np.int64)
        for index in range(len(self)):
            with suppress(UserError):
                counts[index] = count_words(self[index])
        return counts

    @property
    def images_inside(self) -> bool:
        """Whether no image is looked for in the image folder."""
        return bool(self.stores)

    def source_of(self, index: int) -> str:
        """Label of the source that a sample is from."""
        return self.label

    def file_index(self, index: int) -> int:
        """Index that a sample has in what was opened, whatever was selected from it."""
        return index


class FileSource(SampleSource):
    """The samples of one file.

    Args:
        path: of the file.
        label: see `SampleSource`; None takes the file's name.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        self.path = Path(path)
        self.label = self.path.name if label is None else label
        self._state = file_state(self.path)

    @property
    def lengths(self) -> np.ndarray:
        """As of every source; counted once and kept beside the file."""
        return cached_array(self.path, self._state, "words-v3", self._count)

    def _copy(self) -> tuple[Any, ...]:
        """Arguments that open the file again."""
        return self.path, self.label

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self._copy(), self._state)


def _reopen(kind: type[FileSource], arguments: tuple[Any, ...], state: Any) -> FileSource:
    """Open a file in another process, which must see the same samples."""
    samples = kind(*arguments)
    if samples._state != state:
        raise InputError(
            f"data file {samples.path} was changed while it is in use; leave it alone until the run has ended."
        )
    return samples


class _SampleList(SampleSource):
    """Samples that are held in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def _look_up(self, index: int) -> Sample:
        return self.samples[index]

    def raw(self, index: int) -> bytes:
        return json.dumps(self.samples[index]).encode()

    def place(self, index: int) -> str:
        return f"entry {index + 1}"


class Selection(SampleSource):
    """The samples of a sequence that stand at some indices, in the order of the indices."""

    def __init__(self, samples: Sequence[Sample], indices: Sequence[int] | np.ndarray) -> None:
        self.samples = as_source(samples)
        self.indices = np.asarray(indices, dtype=np.int64)
        self.label, self.stores = self.samples.label, self.samples.stores

    def __len__(self) -> int:
        """Number of samples selected."""
        return len(self.indices)

    def _look_up(self, index: int) -> Sample:
        return self.samples[int(self.indices[index])]

    def raw(self, index: int) -> bytes:
        """As of the samples selected from."""
        return self.samples.raw(int(self.indices[index]))

    def place(self, index: int) -> str:
        """As of the samples selected from."""
        return self.samples.place(int(self.indices[index]))

    @property
    def lengths(self) -> np.ndarray:
        """As of the samples selected from."""
        return self.samples.lengths[self.indices]

    @property
    def images_inside(self) -> bool:
        """As of the samples selected from."""
        return self.samples.images_inside

    def source_of(self, index: int) -> str:
        """As of the samples selected from."""
        return self.samples.source_of(int(self.indices[index]))

    def file_index(self, index: int) -> int:
        """As of the samples selected from."""
        return self.samples.file_index(int(self.indices[index]))


class JoinedSamples(SampleSource):
    """The samples of several sources, one source after the other.

    Args:
        parts: the sources; labels differ.
        label: of all together, if they are the pieces of one; None keeps the label of each.
    """

    def __init__(self, parts: Sequence[SampleSource], label: str | None = None) -> None:
        self.parts = parts
        self.label, self._is_one = label or "", label is not None
        self.stores = {label: store for part in parts for label, store in part.stores.items()}
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        """Number of samples of all."""
        return self._ends[-1]

    def _find(self, index: int) -> tuple[SampleSource, int]:
        position = bisect_right(self._ends, index)
        return self.parts[position], index - (self._ends[position - 1] if position else 0)

    def _look_up(self, index: int) -> Sample:
        part, own = self._find(index)
        return part[own]

    def raw(self, index: int) -> bytes:
        """As of the source that has it."""
        part, own = self._find(index)
        return part.raw(own)

    def place(self, index: int) -> str:
        """Label of the source, and the place in it."""
        part, own = self._find(index)
        return f"{part.label}, {part.place(own)}"

    @property
    def lengths(self) -> np.ndarray:
        """Of all sources."""
        return np.concatenate([part.lengths for part in self.parts])

    @property
    def images_inside(self) -> bool:
        """Whether all sources have their images inside."""
        return all(part.images_inside for part in self.parts)

    def source_of(self, index: int) -> str:
        """Label of the source, or of all together."""
        part, own = self._find(index)
        return self.label if self._is_one else part.source_of(own)


def as_source(samples: Sequence[Sample]) -> SampleSource:
    """Samples with all that a source has; they may be a list."""
    return samples if isinstance(samples, SampleSource) else _SampleList(samples)


def select_samples(samples: Sequence[Sample], indices: Sequence[int] | np.ndarray) -> Sequence[Sample]:
    """Take some samples, in the order of the indices; if that is all of them, they are returned as they are."""
    return samples if np.array_equal(indices, np.arange(len(samples))) else Selection(samples, indices)


def drawn_evenly(count: int, most: int | None) -> np.ndarray:
    """Indices (int64, in order) of at most so many of `count` samples, at equal distances; of all if `most` is None."""
    number = count if most is None else min(most, count)
    return np.arange(number, dtype=np.int64) * count // max(number, 1)


def file_index(samples: Sequence[Sample], index: int) -> int:
    """Index that a sample has in what was opened, whatever was selected from it."""
    return as_source(samples).file_index(index)


def source_of(samples: Sequence[Sample], index: int) -> str:
    """Label of the source that a sample is from, such as the name of its file; "" where samples are a list."""
    return as_source(samples).source_of(index)


def sample_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """`count_words` of every sample, (N,) int64; read from beside the data file, where there is one."""
    return as_source(samples).lengths


def image_places(samples: Sequence[Sample], image_folder: str | Path) -> ImagePlaces:
    """Where the images of samples lie: in their files, and for all other names in the image folder."""
    return ImagePlaces(image_folder, as_source(samples).stores)
