"""The check of a whole data set, in parallel: what the data doctor shows, and what training asks before it starts."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from integrations.llava.prompts import Template

from ..places import ImagePlaces
from ..samples import Sample, image_names, sample_id, source_name
from ..source import SampleSource, UnreadableSampleError, as_source, image_places
from .findings import Fault, Finding
from .images import CheckImages, image_faults
from .parallel import in_parallel
from .texts import TokenLimit, conversation_faults, sample_warnings

__all__ = ["Source", "Survey", "survey_samples"]

_TEXTS_PER_TASK = 500
_IMAGES_PER_TASK = 50
# Source of samples with a fault that leaves unsaid which images belong to them.
_UNCLEAR = "(unclear)"
_UNNAMED = {"not_an_object", "no_conversation", "bad_image_entry", "outside_folder", "linked_image"}


@dataclass(frozen=True)
class Source:
    """Number of samples, and of different images, that come from one data set."""

    num_samples: int
    num_images: int


@dataclass(frozen=True)
class Survey:
    """The faults of a data set.

    Attributes:
        num_samples: samples, or what stands in their place.
        sources: name -> how much comes from there, the largest first.
        findings: every fault, in the order of the samples.
    """

    num_samples: int
    sources: Mapping[str, Source]
    findings: Sequence[Finding]

    @property
    def problems(self) -> list[Finding]:
        """Faults that training does not cope with."""
        return [finding for finding in self.findings if finding.is_problem]

    @property
    def warnings(self) -> list[Finding]:
        """Faults that training copes with."""
        return [finding for finding in self.findings if not finding.is_problem]

    @property
    def usable(self) -> np.ndarray:
        """Indices of the samples without problem, int64, in order."""
        return np.setdiff1d(np.arange(self.num_samples), [finding.index for finding in self.problems])


def survey_samples(
    samples: Sequence[Sample],
    *,
    image_folder: str | Path,
    template: Template,
    check_images: CheckImages = "size",
    max_pixels: int | None = None,
    tokens: TokenLimit | None = None,
    workers: int | None = None,
    warnings: bool = True,
) -> Survey:
    """Check every sample, and every image once.

    Args:
        samples: in LLaVA's format, or what should be.
        image_folder: what image names are relative to.
        template: the prompt template they will be written with.
        check_images: decode every image, read only its header, or do not look at it.
        max_pixels: larger images are a problem; None allows what Pillow opens.
        tokens: check lengths in tokens too.
        workers: processes; None takes one per CPU, 1 checks in this process.
        warnings: also look for what is harmless.
    """
    samples, places = as_source(samples), image_places(samples, image_folder)
    check = partial(_check_text, samples=samples, places=places, template=template, tokens=tokens, warnings=warnings)
    texts = in_parallel(
        check, range(len(samples)), size=_TEXTS_PER_TASK, workers=workers, what="checking texts", unit="sample"
    )
    book = _Book(samples, warnings)
    for index, checked in enumerate(texts):
        book.add_text(index, checked)
    if check_images != "none":
        look = partial(image_faults, places, how=check_images, max_pixels=max_pixels)
        faults = in_parallel(
            look, list(book.images), size=_IMAGES_PER_TASK, workers=workers, what="checking images", unit="image"
        )
        book.add_images(list(faults))
    return book.close()


class _CheckedText(NamedTuple):
    """What is known of a sample without looking at its images; `images` are names that can be looked at."""

    sample_id: str
    has_id: bool
    source: str
    images: Sequence[str]
    faults: Sequence[Fault]


def _check_text(
    index: int,
    *,
    samples: SampleSource,
    places: ImagePlaces,
    template: Template,
    tokens: TokenLimit | None,
    warnings: bool,
) -> _CheckedText:
    try:
        sample = samples[index]
    except UnreadableSampleError as error:
        fault = Fault(error.kind, error.reason)
        return _CheckedText(str(samples.file_index(index)), False, _UNCLEAR, (), (fault,))
    faults = list(conversation_faults(sample, template, places))
    # No image of a sample with one of these faults is looked at.
    sound = _UNNAMED.isdisjoint(fault.kind for fault in faults)
    images = image_names(sample) if sound else ()
    if not faults:
        if tokens is not None:
            faults += tokens.faults(sample, template, places)
        if warnings:
            faults += sample_warnings(sample)
    source = source_name(images[0] if images else None) if sound else _UNCLEAR
    has_id = isinstance(sample, Mapping) and sample.get("id") is not None
    return _CheckedText(sample_id(sample, samples.file_index(index)), has_id, source, images, faults)


class _Book:
    """The findings so far, and which samples an image belongs to."""

    def __init__(self, samples: SampleSource, warnings: bool) -> None:
        self.samples, self.warnings = samples, warnings
        self.findings: list[Finding] = []
        self.images: dict[str, int] = {}
        self._image_of, self._sample_of = array("q"), array("q")
        self._num_samples: Counter[str] = Counter()
        self._first_use: dict[str, int] = {}

    def add_text(self, index: int, checked: _CheckedText) -> None:
        self._num_samples[checked.source] += 1
        for fault in checked.faults:
            self._add(index, checked.sample_id, checked.source, fault)
        for name in dict.fromkeys(checked.images):
            self._image_of.append(self.images.setdefault(name, len(self.images)))
            self._sample_of.append(index)
        if self.warnings and checked.has_id:
            first = self._first_use.setdefault(checked.sample_id, index)
            # Of a mix, a sample may come twice, with its place.
            if first != index and self.samples.place(first) != self.samples.place(index):
                fault = Fault("duplicate_id", f"has the id of {self.samples.place(first)}")
                self._add(index, checked.sample_id, checked.source, fault)

    def add_images(self, faults: Sequence[Sequence[Fault]]) -> None:
        """Take the faults of every image, in the order of `images`."""
        for image, index in zip(self._image_of, self._sample_of, strict=True):
            for fault in faults[image]:
                sample = self.samples[index]
                self._add(
                    index, sample_id(sample, self.samples.file_index(index)), source_name(image_names(sample)[0]), fault
                )

    def close(self) -> Survey:
        num_images = Counter(source_name(name) for name in self.images)
        return Survey(
            len(self.samples),
            {name: Source(count, num_images[name]) for name, count in self._num_samples.most_common()},
            sorted(self.findings, key=lambda finding: finding.index),
        )

    def _add(self, index: int, own_id: str, source: str, fault: Fault) -> None:
        if self.warnings or fault.is_problem:
            self.findings.append(
                Finding(index=index, place=self.samples.place(index), sample_id=own_id, source=source, **asdict(fault))
            )
