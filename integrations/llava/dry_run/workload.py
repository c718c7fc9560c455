"""What a stage has to read: how many samples, how long. Measured on its data file, or assumed where none is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from integrations.llava.config import StageConfig
from integrations.llava.data import Sample, sample_lengths
from integrations.llava.prompts import get_template

__all__ = ["PUBLISHED_SAMPLES", "TOKENS_PER_WORD", "Workload", "assumed_workload", "measured_workload"]

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
        text_tokens: per sample, on average, without those of images.
        longest: tokens of the longest sample, images included, after cutting to `max_length`.
        origin: where these numbers come from.
    """

    samples: int
    images: float
    text_tokens: float
    longest: int
    origin: str

    def tokens(self, tokens_per_image: int) -> float:
        """Average length T of a sample, images included."""
        return self.images * tokens_per_image + self.text_tokens


def assumed_workload(name: str, config: StageConfig, tokens_per_image: int) -> Workload:
    """Describe a stage whose data are not at hand: as many samples as published, or as `max_steps` takes.

    Their lengths are assumed, and that each has one image.

    Args:
        name: of the stage.
        config: of the stage.
        tokens_per_image: positions of an image.

    Returns:
        The description; it says what is assumed.
    """
    captions = get_template(config.template).caption_only
    text = _CAPTION_TOKENS if captions else _CONVERSATION_TOKENS
    longest = tokens_per_image + _LONGEST_CAPTION if captions else config.data.max_length
    steps = config.max_steps
    return Workload(
        samples=PUBLISHED_SAMPLES[name] if steps is None else steps * config.batch_size,
        images=1.0,
        text_tokens=float(text),
        longest=min(longest, config.data.max_length),
        origin=f"{'published number of samples' if steps is None else 'samples of max_steps'}, assumed lengths",
    )


def measured_workload(samples: Sequence[Sample], config: StageConfig, tokens_per_image: int) -> Workload:
    """Describe a stage by its samples; each has one image or none.

    Args:
        samples: in LLaVA's format.
        config: of the stage.
        tokens_per_image: positions of an image.

    Returns:
        The description. Tokens are words times `TOKENS_PER_WORD`.
    """
    words = sample_lengths(samples)
    images = tokens_per_image * (words > 0)
    system = len(get_template(config.template).system.split())
    lengths = np.minimum(images + TOKENS_PER_WORD * (np.abs(words) + system), config.data.max_length)
    return Workload(
        samples=len(words),
        images=float((words > 0).mean()),
        text_tokens=float((lengths - images).mean()),
        longest=round(float(lengths.max())),
        origin=f"measured on {config.data.path}, {TOKENS_PER_WORD} tokens a word",
    )
