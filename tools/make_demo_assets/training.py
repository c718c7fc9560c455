"""What the two asset recipes share: fixed threads and seeds, and a warm-up plus cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["deterministic", "make_optimizer", "make_schedule", "weights_and_no_decay"]


@contextmanager
def deterministic(seed: int, *, num_threads: int) -> Iterator[None]:
    """Seed torch and fix its number of threads, and put both back afterwards.

    Sums split over another number of threads round differently, hence part of the recipe.
    """
    threads, state, strict = (
        torch.get_num_threads(),
        torch.get_rng_state(),
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.set_num_threads(num_threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        torch.use_deterministic_algorithms(strict)


def weights_and_no_decay(modules: Iterable[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into matrices, which are decayed, and biases, scales and the like, which are not."""
    parameters = [p for module in modules for p in module.parameters()]
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]


def make_optimizer(modules: Iterable[nn.Module], *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over the modules' parameters."""
    decayed, plain = weights_and_no_decay(modules)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def make_schedule(
    optimizer: torch.optim.Optimizer, *, num_steps: int, warmup: float = 0.05
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a linear warm-up over a fraction of the steps, then a cosine to a hundredth."""
    warmup_steps = max(1, int(num_steps * warmup))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
