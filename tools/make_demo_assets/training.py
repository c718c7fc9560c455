"""Optimizer, schedule, seeds and threads of both asset recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["deterministic", "make_optimizer", "make_schedule"]


@contextmanager
def deterministic(seed: int, *, num_threads: int) -> Iterator[None]:
    """Seed torch and fix its number of threads, and put both back afterwards.

    Sums split over another number of threads round differently, hence part of the recipe.
    """
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=()):
        torch.set_num_threads(num_threads)
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)


def make_optimizer(modules: Iterable[nn.Module], *, learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW that decays the modules' matrices, and not their biases, scales and the like."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def make_schedule(optimizer: torch.optim.Optimizer, *, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a linear warm-up over a twentieth of the steps, then a cosine to a hundredth."""
    warmup_steps = max(1, int(num_steps * 0.05))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
