"""Batches of prompts, prepared while the model answers those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["load_batches"]

_THREADS = 4


def load_batches(
    prompts: Dataset[dict[str, Any]],
    batches: Sequence[list[int]],
    join: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
    *,
    num_workers: int,
    for_gpu: bool,
) -> Iterator[dict[str, Any]]:
    """Prepare batches, in order, ahead of whoever takes them.

    Args:
        prompts: are prepared when they are asked for.
        batches: indices of prompts.
        join: makes a batch of prepared prompts.
        num_workers: processes that prepare; 0 are threads of this one: few where the CPU answers, too.
        for_gpu: whether a GPU answers; tensors are then in memory that it reads while it computes.
    """
    if num_workers:
        yield from DataLoader(
            prompts,
            batch_sampler=batches,
            collate_fn=join,
            num_workers=num_workers,
            pin_memory=for_gpu,
            generator=torch.Generator(),
        )
        return

    def load(batch: Sequence[int]) -> dict[str, Any]:
        joined = join([prompts[index] for index in batch])
        pinned = {name: own.pin_memory() for name, own in joined.items() if for_gpu and isinstance(own, torch.Tensor)}
        return joined | pinned

    threads = _THREADS if for_gpu else 1
    waiting: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(load, batch))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
