"""The images of a data set that its feature cache lacks: found, and prepared for the backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from integrations.llava.image_layout import ImageSize
from layerfuse.errors import UserError

from .dataset import ConversationDataset
from .doctor.parallel import in_parallel
from .feature_cache import picture_digest
from .images import read_image_size
from .samples import image_names

__all__ = ["UncachedImage", "prepare_uncached", "uncached_images"]

UncachedImage = tuple[str, torch.Tensor, ImageSize]
"""Digest of an image's file, its pixels (tiles, C, height, width), and its height and width before that."""

# Images that a process looks up at a time.
_LOOK_UP = 200


def uncached_images(
    dataset: ConversationDataset, *, share: tuple[int, int] = (0, 1), workers: int = 1
) -> tuple[dict[str, int], int]:
    """Find the images that the cache lacks, with their numbers of tiles, and count all.

    One that cannot be read is left to training, which says so.

    Args:
        dataset: has a cache.
        share: (k, n) looks at the k-th of n equal shares of all images, from 0.
        workers: processes that look.
    """
    names = list(dict.fromkeys(name for sample in dataset.samples for name in image_names(sample)))
    own = names[share[0] :: share[1]]
    look = partial(_missing_tiles, dataset)
    missing = in_parallel(look, own, size=_LOOK_UP, workers=max(workers, 1), what="feature cache", unit="image")
    return {name: tiles for name, tiles in zip(own, missing, strict=True) if tiles}, len(names)


def prepare_uncached(
    dataset: ConversationDataset, names: Sequence[str], *, size: int, workers: int = 1
) -> Iterator[list[UncachedImage]]:
    """Prepare images in batches of `size`, without those that cannot be read or change meanwhile."""
    prepare, batch = partial(_prepared, dataset), list[UncachedImage]()
    for image in in_parallel(prepare, names, size=size, workers=max(workers, 1), what="encoding", unit="image"):
        batch += [image] if image is not None else []
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _missing_tiles(dataset: ConversationDataset, name: str) -> int:
    """Number of tiles of an image that the cache lacks; 0 where it has them, or nobody can."""
    path, layout = dataset.places / name, dataset.layout
    assert dataset.cache is not None
    try:
        if dataset.cache.holds(picture_digest(path)):
            return 0
    except (OSError, ValueError):
        return 0
    size = read_image_size(path, upright=dataset.preprocessing.upright) if layout.depends_on_size else None
    return layout.num_tiles(size)


def _prepared(dataset: ConversationDataset, name: str) -> UncachedImage | None:
    path = dataset.places / name
    try:
        digest = picture_digest(path)
        pixels, size = dataset.pixels(name)
        # Another picture that was put there meanwhile must not get this one's name.
        return (digest, pixels, size) if picture_digest(path) == digest else None
    except (OSError, ValueError, UserError):
        return None
