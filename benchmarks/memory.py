"""Bytes that a call needs beyond what there was, and bytes that a result keeps alive."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Call

__all__ = ["extra_bytes", "held_bytes"]


def extra_bytes(call: Call, *, device: str) -> int:
    """Return the peak of what a call allocates, its result included, above what was there when it began.

    On the CPU all allocations and frees of torch's allocator are added up, those inside operators too, as torch's
    profiler reports them; on CUDA it is the caching allocator's own peak. The call has run before, so that what is made
    once and kept does not count.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silent_errors(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def held_bytes(*results: object) -> int:
    """Add up the storages that tensors in results keep alive, each once: a view holds the whole that it views."""
    storages = {}
    for tensor in _tensors(results):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            yield from _tensors(entry)


@contextmanager
def _silent_errors() -> Iterator[None]:
    """Keep quiet what the profiler's library writes past Python: a line at each start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
