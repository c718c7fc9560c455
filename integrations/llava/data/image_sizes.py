"""Sizes of the images of many samples, from the heads of their files, and what the samples are long with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from integrations.llava.image_layout import ImageLayout, ImageSize

from .doctor.parallel import in_parallel
from .images import read_image_size
from .places import ImagePlaces
from .samples import Sample, image_names
from .source import image_places, sample_lengths

__all__ = ["grouping_lengths", "sample_image_sizes"]

_IMAGES_PER_TASK = 50


def sample_image_sizes(
    samples: Sequence[Sample], image_folder: str | Path, *, upright: bool
) -> list[list[ImageSize | None]]:
    """Height and width in pixels of the images of each sample, each file looked at once; None for an unreadable one.

    Args:
        samples: in LLaVA's format.
        image_folder: what image names are relative to.
        upright: whether images will be turned as their Exif data say.
    """
    names = [image_names(sample) for sample in samples]
    unique = list(dict.fromkeys(name for own in names for name in own))
    look = partial(_size_of, image_places(samples, image_folder), upright)
    found = in_parallel(look, unique, size=_IMAGES_PER_TASK, workers=None, what="reading sizes", unit="image")
    sizes = dict(zip(unique, found, strict=True))
    return [[sizes[name] for name in own] for own in names]


def grouping_lengths(
    samples: Sequence[Sample], layout: ImageLayout, image_folder: str | Path, *, upright: bool
) -> list[int]:
    """Lengths by which batches are grouped; negative for samples without image.

    They are words, as the published sampler counts them; where an image's tokens depend on its size, these are added.
    Arguments are as of `sample_image_sizes`.
    """
    words: list[int] = sample_lengths(samples).tolist()
    if not layout.depends_on_size:
        return words
    sizes = sample_image_sizes(samples, image_folder, upright=upright)
    # A sample without image has none to add to its negative length.
    return [count + sum(map(layout.num_tokens, own)) for count, own in zip(words, sizes, strict=True)]


def _size_of(places: ImagePlaces, upright: bool, name: str) -> ImageSize | None:
    return read_image_size(places / name, upright=upright)
