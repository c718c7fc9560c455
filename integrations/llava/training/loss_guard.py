"""Numbers of an optimizer step, and the error that stops a run when one of them is NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

__all__ = ["BrokenBatch", "Later", "NonFiniteLossError", "OptimizerStep"]


class Later:
    """A value on its way from its device; nobody waits for it before it is read."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value.detach()
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> torch.Tensor:
        """The value on the CPU, once the device has come as far, no further."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value.cpu()


@dataclass
class OptimizerStep:
    """An optimizer step, as one process sees it.

    Attributes:
        number: counted from 1, as checkpoints and logs do.
        learning_rate: of the first parameter group.
        sample_ids: of each micro batch; empty where the data have no ids.
        num_skipped: samples left out of the micro batches.
        num_tokens: positions of the micro batches that are no padding.
        losses: a scalar per micro batch, on the device.
        finite: whether each loss is finite; None until the last one is computed.
        grad_norm: norm of all gradients before they are clipped; None until it is known.
    """

    number: int
    learning_rate: float
    sample_ids: list[list[str]]
    num_skipped: int = 0
    num_tokens: torch.Tensor | int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    finite: Later | None = None
    grad_norm: torch.Tensor | float | None = None


@dataclass(frozen=True)
class BrokenBatch:
    """A micro batch that made a number NaN or infinite, of the process with this rank."""

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
        self.step, self.batches, self.grad_norm = step, tuple(batches), grad_norm
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
        """The error as JSON can hold it; numbers that JSON has no word for are text."""

        def number(value: float | None) -> float | str | None:
            return value if value is None or math.isfinite(value) else str(value)

        batches = [asdict(batch) | {"loss": number(batch.loss)} for batch in self.batches]
        return {"step": self.step, "grad_norm": number(self.grad_norm), "micro_batches": batches}
