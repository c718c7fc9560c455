"""Optimizer steps of a stage, counted as transformers' Trainer counts them.

    batches of one process  = ceil(ceil(samples / micro batch) / processes)     the last ones are filled up
    steps of an epoch       = ceil(batches / accumulation)                      the last one may be short
    steps of the stage      = ceil(epochs * steps of an epoch), or max_steps

Rounding up three times is rounding up once, so the number of processes does not matter: 558,128 pairs at batch size
256 are 2,181 steps, 665,298 samples at 128 are 5,198. Older versions of transformers rounded the second line down
(huggingface/transformers#36297, 4.48): on one GPU they made 2,180 and 5,197, without accumulation as many as today.
"""

from __future__ import annotations

import math

from integrations.llava.config import StageConfig

__all__ = ["optimizer_steps", "samples_seen"]


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
