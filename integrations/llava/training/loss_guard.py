"""What is known of an optimizer step, and the error that stops a run whose numbers have broken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

__all__ = ["BrokenBatch", "Later", "NonFiniteLossError", "OptimizerStep"]


class Later:
    """A value on its way from the device; nobody waits for it before it is read.

    Args:
        value: on any device.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value.detach()
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> torch.Tensor:
        """Wait until the device has come as far as the value, no further, and return it on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value.cpu()


@dataclass
class OptimizerStep:
    """An optimizer step, as one process sees it.

    Attributes:
        number: counted from 1, as checkpoints and logs do.
        learning_rate: that the step is made with; of the first parameter group.
        sample_ids: of each micro batch; empty where the data have no ids.
        num_skipped: samples left out of the micro batches.
        losses: one number per micro batch, on the device.
        finite: whether each loss is finite; None until the last one is computed.
        grad_norm: norm of all gradients before they are clipped; None until it is known.
    """

    number: int
    learning_rate: float
    sample_ids: list[list[str]]
    num_skipped: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    finite: Later | None = None
    grad_norm: torch.Tensor | float | None = None


@dataclass(frozen=True)
class BrokenBatch:
    """A micro batch that made a number NaN or infinite.

    Attributes:
        process: rank of the process it belongs to.
        loss: its loss.
        sample_ids: its samples.
    """

    process: int
    loss: float
    sample_ids: tuple[str, ...]


class NonFiniteLossError(FloatingPointError):
    """Raised when the loss or the norm of the gradients is NaN or infinite.

    Args:
        step: number of the optimizer step.
        batches: the micro batches at fault.
        grad_norm: given if it was the gradients, not the loss, that broke.
    """

    def __init__(self, step: int, batches: Sequence[BrokenBatch], *, grad_norm: float | None = None) -> None:
        self.step = step
        self.batches = tuple(batches)
        self.grad_norm = grad_norm
        what = "the loss" if grad_norm is None else f"the gradients' norm is {grad_norm}, though the loss"
        listing = "; ".join(
            f"{batch.loss} in process {batch.process} for samples {', '.join(batch.sample_ids) or '(without ids)'}"
            for batch in self.batches
        )
        super().__init__(
            f"step {step}: {what} is {listing}. The step was not made"
            + ("" if grad_norm is None else " part of any checkpoint")
            + "; the last checkpoint is good. Look at these samples, or lower the learning rate, then start again."
        )

    def to_dict(self) -> dict[str, object]:
        """Describe the error so that JSON can hold it; numbers that JSON has no word for are text."""
        batches = [asdict(batch) | {"loss": _number(batch.loss)} for batch in self.batches]
        return {"step": self.step, "grad_norm": _number(self.grad_norm), "micro_batches": batches}


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
