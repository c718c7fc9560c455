"""One job for many items, in several processes, with a progress bar."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

__all__ = ["in_parallel"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 32


def in_parallel(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    size: int,
    workers: int | None,
    what: str,
    unit: str,
) -> Iterator[Result]:
    """Apply a function to all items; a DataLoader's processes do the work.

    Args:
        function: of an item; it is copied to every process.
        items: to work on.
        size: items that a process takes at a time.
        workers: processes; None takes one per CPU. With 1, or little to do, the work is done in this process.
        what: text before the progress bar, which is shown in a terminal only.
        unit: what an item is called there.

    Yields:
        The results of all items, in order.
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or min(num_cpus, _MOST_WORKERS), -(-len(items) // size))
    with warnings.catch_warnings():
        # More processes than CPUs are what hides a network disk's delays.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loaded = iter(
            DataLoader(
                _Results(function, items),
                batch_size=size,
                collate_fn=list,
                num_workers=workers if workers > 1 else 0,
                # Of its own: the work must not move the random state of the run that it precedes.
                generator=torch.Generator(),
            )
        )
    with tqdm(total=len(items), desc=what, unit=unit, disable=None, leave=False) as bar:
        for results in loaded:
            yield from results
            bar.update(len(results))


class _Results(Dataset[Result], Generic[Item, Result]):
    def __init__(self, function: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Result:
        return self.function(self.items[index])
