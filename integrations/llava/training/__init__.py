"""Training: a recipe's stages run one after the other, by one process or several, stopped and continued."""

from __future__ import annotations

from .distributed import ProcessFailedError
from .loss_guard import NonFiniteLossError
from .plan import RANDOM, default_stages
from .run_folder import RunFolder
from .signals import RunInterrupted
from .train import train

__all__ = [
    "RANDOM",
    "NonFiniteLossError",
    "ProcessFailedError",
    "RunFolder",
    "RunInterrupted",
    "default_stages",
    "train",
]
