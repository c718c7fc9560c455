"""The samples of a stage: found and checked by the main process, opened by all."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from integrations.llava.config import StageConfig
from integrations.llava.data import (
    Sample,
    SampleMix,
    SampleSource,
    drawn_evenly,
    read_samples,
    sample_lengths,
    select_samples,
    usable_indices,
)
from integrations.llava.prompts import Template

__all__ = ["FoundSamples", "find_samples", "open_samples"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundSamples:
    """Samples that a stage trains on.

    Attributes:
        indices: of them in their file, int64, in order.
        digest: of what is written there.
        lengths: for batches that are grouped by them, or None.
        num_left_out: bad samples that are left out.
    """

    indices: np.ndarray
    digest: str
    lengths: list[int] | None
    num_left_out: int


def find_samples(stage: str, config: StageConfig, template: Template) -> FoundSamples:
    """Read and check the samples of a stage, written out with a template; one process does it for all.

    Raises:
        ValueError: if they are at fault.
        FileNotFoundError: if their file does not exist.
    """
    data, samples = config.data, read_samples(config.data.path, seed=config.seed)
    if isinstance(samples, SampleMix):
        _log.info("stage %s: %s", stage, samples.counts)
    drawn = drawn_evenly(len(samples), data.max_samples)
    usable, _ = usable_indices(
        select_samples(samples, drawn),
        image_folder=data.image_folder,
        template=template,
        check_images=data.check_images,
        bad_samples=data.bad_samples,
    )
    indices = drawn[usable]
    lengths = sample_lengths(select_samples(samples, indices)).tolist() if config.group_by_modality else None
    return FoundSamples(indices, _digest(samples, indices), lengths, len(drawn) - len(indices))


def open_samples(config: StageConfig, found: FoundSamples) -> Sequence[Sample]:
    """Open the samples that the main process has found; the first to open a file has written its index."""
    return select_samples(read_samples(config.data.path, seed=config.seed), found.indices)


def _digest(samples: SampleSource, indices: np.ndarray) -> str:
    """Digest of samples as they are written, in their order: about a second for a gigabyte.

    Size and time of change would not do: an edit can keep both, a copy changes the time alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    for index in indices.tolist():
        raw = samples.raw(index)
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
