"""Samplers: the index lists of the published code, so that runs can be compared batch by batch.

The grouped order is LLaVA-1.5's (arXiv:2310.03744; `llava/train/llava_trainer.py`), its oddity of the last batches
included. In the first epoch both samplers also draw as the published run does, so that a seed gives its batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from layerfuse.errors import InputError

__all__ = ["ModalityLengthSampler", "ShuffleSampler", "modality_length_indices"]


def modality_length_indices(
    lengths: Sequence[int], *, batch_size: int, world_size: int = 1, generator: torch.Generator | None = None
) -> list[int]:
    """Order samples so that a global batch holds one modality and like lengths.

    Args:
        lengths: of every sample; negative for samples without image, never 0.
        batch_size: samples per process and step.
        world_size: number of processes.
        generator: source of randomness; the global one if None.

    Returns:
        Every index once.

    Raises:
        ValueError: if a length is 0, since its sign then says nothing.
    """
    if not all(lengths):
        raise InputError(
            f"sample {list(lengths).index(0)} has length 0; lengths are positive, or negative without image."
        )
    with_image = [index for index, length in enumerate(lengths) if length > 0]
    without = [index for index, length in enumerate(lengths) if length < 0]
    if not with_image or not without:
        # Published: signs stay, so that samples without image come shortest first.
        return _length_grouped(lengths, batch_size, world_size, generator)
    global_batch = batch_size * world_size
    batches: list[list[int]] = []
    rest: list[int] = []
    for indices in (with_image, without):
        order = _length_grouped([abs(lengths[index]) for index in indices], batch_size, world_size, generator)
        ordered = [indices[position] for position in order]
        chunks = [ordered[start : start + global_batch] for start in range(0, len(ordered), global_batch)]
        # Published: the last batch of each modality is set aside, also if it is full.
        rest += chunks.pop()
        batches += chunks
    shuffled = [batches[position] for position in torch.randperm(len(batches), generator=generator).tolist()]
    return [index for batch in [*shuffled, sorted(rest)] for index in batch]


def _length_grouped(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None
) -> list[int]:
    """Shuffle, then deal each global batch out to the processes so that all get about the same number of words."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    global_batch = batch_size * world_size
    dealt: list[int] = []
    for start in range(0, len(order), global_batch):
        batch = sorted(order[start : start + global_batch], key=lambda index: lengths[index], reverse=True)
        for share in _even_shares(batch, lengths, world_size):
            dealt += share
    return dealt


def _even_shares(batch: Sequence[int], lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    if len(batch) % num_shares:
        return [list(batch[share::num_shares]) for share in range(num_shares)]
    size = len(batch) // num_shares
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals: list[float] = [0] * num_shares
    for index in batch:
        smallest = totals.index(min(totals))
        shares[smallest].append(index)
        totals[smallest] = totals[smallest] + lengths[index] if len(shares[smallest]) < size else math.inf
    return shares


class ShuffleSampler(Sampler[int]):
    """Yields every index once, in a random order that is another one in every epoch.

    Args:
        num_samples: number of indices.
        seed: the order of epoch e depends on seed and e only, so that a resumed run meets the same batches.
    """

    def __init__(self, num_samples: int, *, seed: int = 0) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; accelerate calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of samples."""
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        """Iterate over the indices of one epoch."""
        # The published run seeds the global generator; torch's DataLoader takes the seed of its workers from it first.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        _draw(generator)
        return iter(self._indices(generator))

    def _indices(self, generator: torch.Generator) -> list[int]:
        # torch's RandomSampler draws the seed of another generator.
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(_draw(generator))).tolist()


class ModalityLengthSampler(ShuffleSampler):
    """Yields `modality_length_indices`, anew in every epoch.

    Args:
        lengths: as in `modality_length_indices`, like `batch_size` and `world_size`.
        seed: as in `ShuffleSampler`.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, world_size: int = 1, seed: int = 0) -> None:
        super().__init__(len(lengths), seed=seed)
        self.lengths = lengths
        self.batch_size = batch_size
        self.world_size = world_size

    def _indices(self, generator: torch.Generator) -> list[int]:
        return modality_length_indices(
            self.lengths, batch_size=self.batch_size, world_size=self.world_size, generator=generator
        )


def _draw(generator: torch.Generator) -> int:
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
