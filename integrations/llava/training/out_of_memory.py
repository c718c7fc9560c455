"""An error that says which batch found no memory, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from layerfuse.errors import InputError

from .loss_guard import OptimizerStep

__all__ = ["naming_batch"]


@contextmanager
def naming_batch(
    made: Callable[[], OptimizerStep], place: int | None = None, shape: Sequence[int] = ()
) -> Iterator[None]:
    """Say of an out of memory error which step and batch it met.

    Args:
        made: gives the step that is being made.
        place: of the micro batch in it, counted from 0; None outside of them, where the optimizer steps.
        shape: of the micro batch's ids: samples (1 if they stand in one row), positions.

    Raises:
        ValueError: in place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        step = made()
        if place is None:
            where = "outside of a micro batch, in the optimizer's step or an evaluation"
        else:
            ids = ", ".join(step.sample_ids[place]) or "(without ids)"
            which = f"micro batch {place + 1} of {len(step.sample_ids)}"
            where = f"in {which}, {shape[0]} x {shape[-1]:,} positions, samples {ids}"
        raise InputError(
            f"step {step.number}: memory ran out {where}. The step was not made, and the last checkpoint is good. Go "
            "on with gradient_checkpointing: true, with engine: fsdp2 on more GPUs, or on a larger one; or begin anew "
            f"with a smaller micro_batch_size. torch says: {_first(error)}"
        ) from error


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0] or "nothing"
