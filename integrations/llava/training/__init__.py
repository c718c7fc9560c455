"""Training: stages, their trainer, their folder, and the processes that share a run."""

from __future__ import annotations

from .distributed import ProcessFailedError
from .loss_guard import NonFiniteLossError
from .run_folder import RunFolder
from .signals import RunInterrupted
from .train import RANDOM, train

__all__ = [
    "RANDOM",
    "NonFiniteLossError",
    "ProcessFailedError",
    "RunFolder",
    "RunInterrupted",
    "train",
]
