"""A stage's samples, measured on its data file or assumed where none is given, and the steps that they make.

Steps are counted as transformers' Trainer counts them:

    batches of one process  = ceil(ceil(samples / micro batch) / processes)     the last ones are filled up
    steps of an epoch       = ceil(batches / accumulation)                      the last one may be short
    steps of the stage      = ceil(epochs * steps of an epoch), or max_steps

Rounding up three times is rounding up once, so the number of processes does not matter: 558,128 pairs at batch size
256 are 2,181 steps, 665,298 samples at 128 are 5,198. Older versions of transformers rounded the second line down
(huggingface/transformers#36297, 4.48): on one GPU they made 2,180 and 5,197, without accumulation as many as today.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from integrations.llava.config import StageConfig
from integrations.llava.data import (
    ModalityLengthSampler,
    Sample,
    ShuffleSampler,
    sample_image_sizes,
    sample_lengths,
)
from integrations.llava.image_layout import ImageLayout
from integrations.llava.prompts import Template

__all__ = [
    "PUBLISHED_SAMPLES",
    "TOKENS_PER_WORD",
    "Workload",
    "assumed_workload",
    "measured_workload",
    "optimizer_steps",
    "samples_seen",
]

PUBLISHED_SAMPLES = {"pretrain": 558_128, "finetune": 665_298}
"""Samples of the published data: `blip_laion_cc_sbu_558k.json` and `llava_v1_5_mix665k.json`."""

TOKENS_PER_WORD = 1.4
"""Of English text under Llama's tokenizer, punctuation included; our rule of thumb."""

# Our assumptions: a caption has some twenty words; conversations have several turns, and some fill the context.
_CAPTION_TOKENS, _LONGEST_CAPTION = 30, 192
_CONVERSATION_TOKENS = 250


@dataclass(frozen=True)
class Workload:
    """The samples of a stage.

    Attributes:
        samples: their number.
        images: per sample, on average.
        image_tokens: per sample, on average: positions that its images take.
        text_tokens: per sample, on average: all other positions.
        longest: tokens of the longest sample, images included, after cutting to `max_length`.
        origin: where these numbers come from.
        tiles: per sample, on average: pictures that the backbone sees, one an image unless the layout cuts it.
        padding: per sample, on average: positions that fill its micro batch up to the longest sample, of the first
            epoch on one GPU; None where lengths are assumed and batches have padding.
    """

    samples: int
    images: float
    image_tokens: float
    text_tokens: float
    longest: int
    origin: str
    tiles: float
    padding: float | None

    @property
    def tokens(self) -> float:
        """Average length T of a sample, images included."""
        return self.image_tokens + self.text_tokens


def assumed_workload(name: str, config: StageConfig, layout: ImageLayout, template: Template) -> Workload:
    """Describe a stage whose data are not at hand: as many samples as published, or as `max_steps` takes.

    Their lengths are assumed, and that each has one image: of the model's own size, or, where images are cut into
    tiles, of the size that takes most tokens.
    """
    captions = template.caption_only
    size = layout.largest_size
    image = layout.num_tokens(size)
    longest = image + _LONGEST_CAPTION if captions else config.data.max_length
    steps = config.max_steps
    return Workload(
        samples=PUBLISHED_SAMPLES[name] if steps is None else steps * config.batch_size,
        images=1.0,
        image_tokens=float(image),
        text_tokens=float(_CAPTION_TOKENS if captions else _CONVERSATION_TOKENS),
        longest=min(longest, config.data.max_length),
        origin=f"{'published number of samples' if steps is None else 'samples of max_steps'}, assumed lengths"
        + ("" if size is None else f", each with an image of {size[0]} x {size[1]} pixels, the most tokens there are"),
        tiles=float(layout.num_tiles(size)),
        padding=0.0 if config.padding_free else None,
    )


def measured_workload(
    samples: Sequence[Sample], config: StageConfig, layout: ImageLayout, template: Template
) -> Workload:
    """Describe a stage by its samples: words times `TOKENS_PER_WORD`, and what the layout says of their images.

    Args:
        samples: in LLaVA's format.
        config: of the stage.
        template: that it writes samples with.
        layout: of the model. Where an image's size matters, it is read from the head of its file, and that of a file
            that cannot be read is the model's own. Where not, a sample has one image or none.
    """
    words = sample_lengths(samples)
    images, tokens = (words > 0).astype(int), layout.num_tokens() * (words > 0)
    tiles = images * layout.num_tiles()
    if layout.depends_on_size:
        sizes = sample_image_sizes(samples, config.data.image_folder, upright=config.data.upright)
        images, tokens = np.array([*map(len, sizes)]), np.array([sum(map(layout.num_tokens, each)) for each in sizes])
        tiles = np.array([sum(map(layout.num_tiles, each)) for each in sizes])
    system = len((template.system or "").split())
    lengths = np.minimum(tokens + TOKENS_PER_WORD * (np.abs(words) + system), config.data.max_length)
    return Workload(
        samples=len(words),
        images=float(images.mean()),
        image_tokens=float(tokens.mean()),
        text_tokens=float((lengths - tokens).mean()),
        longest=round(float(lengths.max())),
        origin=f"measured on {' '.join(config.data.sources)}, {TOKENS_PER_WORD} tokens a word",
        tiles=float(tiles.mean()),
        padding=0.0 if config.padding_free else _padding(lengths, words, config),
    )


def _padding(lengths: np.ndarray, words: np.ndarray, config: StageConfig) -> float:
    """Count the positions of an average sample's micro batch that are beyond its own."""
    micro_batch, accumulation = config.batches()
    sampler = ShuffleSampler(len(lengths), seed=config.seed)
    if config.group_by_modality:
        # Nothing is as short as 0, which would say neither that there is an image nor that there is none.
        grouped = np.maximum(lengths, 1) * np.where(words < 0, -1, 1)
        sampler = ModalityLengthSampler(
            grouped.tolist(), batch_size=micro_batch, world_size=accumulation, seed=config.seed
        )
    ordered = lengths[list(sampler)]
    longest = np.maximum.reduceat(ordered, np.arange(0, len(ordered), micro_batch))
    return float((np.repeat(longest, micro_batch)[: len(ordered)] - ordered).mean())


def optimizer_steps(samples: int, config: StageConfig, *, num_processes: int = 1) -> int:
    """Number of optimizer steps of a stage on so many samples.

    Raises:
        ValueError: if `batch_size` cannot be divided among so many processes.
    """
    if config.max_steps is not None:
        return config.max_steps
    micro_batch, accumulation = config.batches(num_processes)
    batches = math.ceil(math.ceil(samples / micro_batch) / num_processes)
    return math.ceil(config.epochs * max(math.ceil(batches / accumulation), 1))


def samples_seen(samples: int, config: StageConfig) -> float:
    """Number of samples that a stage reads, repetitions included; with `max_steps` that of full steps."""
    return config.epochs * samples if config.max_steps is None else float(config.max_steps * config.batch_size)
