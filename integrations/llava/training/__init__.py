"""Training: a recipe's stages run one after the other, by one process or several, stopped and continued."""

from __future__ import annotations

from .distributed import ProcessFailedError
from .loss_guard import NonFiniteLossError
from .plan import RANDOM, default_stages
from .run_folder import RunFolder
from .run_status import RunStatus, find_runs
from .signals import RunInterrupted
from .train import train
from .validation import Score

__all__ = [
    "RANDOM",
    "NonFiniteLossError",
    "ProcessFailedError",
    "RunFolder",
    "RunInterrupted",
    "RunStatus",
    "Score",
    "default_stages",
    "find_runs",
    "train",
]
