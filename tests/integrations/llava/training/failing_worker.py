"""What two processes run for test_every_process.py: a training in which one of them fails at a chosen place."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from typing import Any

import yaml
from accelerate import PartialState
from safetensors import SafetensorError

from integrations.llava.cli import train as train_command
from integrations.llava.data import BadSampleError
from integrations.llava.training import distributed

__all__ = ["ERRORS", "PLACES", "again", "fail", "killed"]

ERRORS = {
    "SafetensorError": SafetensorError,
    "RuntimeError": RuntimeError,
    "KeyError": KeyError,
    "MemoryError": MemoryError,
    "YAMLError": yaml.YAMLError,
    "BadSampleError": BadSampleError,
}

# Phase -> for each rank, what it calls there: module, name, and which of the calls fails.
PLACES: dict[str, tuple[tuple[str, str, int], tuple[str, str, int]]] = {
    "data check": (
        ("integrations.llava.training.samples", "usable_indices", 1),
        ("integrations.llava.training.samples", "read_samples", 1),
    ),
    "build": (("integrations.llava.modeling.source", "assemble", 1),) * 2,
    "step": (("integrations.llava.data.dataset.ConversationDataset", "__getitem__", 3),) * 2,
    "checkpoint": (
        ("integrations.llava.training.resume", "save_file", 2),
        ("integrations.llava.training.trainer.LlavaTrainer", "_save_rng_state", 1),
    ),
    "finish": (
        ("integrations.llava.training.result", "save_model", 1),
        ("integrations.llava.training.stage", "forget_engine", 2),
    ),
}


def fail(rank: int, arguments: list[str], phase: str, failing: int, error: str) -> int:
    """Train from the command line; one process raises in a phase."""
    if rank == failing:
        _raise_at(PLACES[phase][rank], ERRORS[error]("the coffee is cold"))
    return train_command.main(arguments)


def killed(rank: int, arguments: list[str], failing: int) -> int:
    """Train from the command line; one process is killed in a step."""
    if rank == failing:
        _at(PLACES["step"][rank], lambda: os.kill(os.getpid(), signal.SIGKILL))
    return train_command.main(arguments)


def again(rank: int) -> int:
    """A block that fails, and another one while the first process's thread still looks for the failure of the first."""
    PartialState(cpu=True)
    board = distributed._board()
    assert board is not None
    board.store = store = _SlowStore(board.store)  # type: ignore[assignment]
    try:
        with distributed.shared_failures():
            if rank == 0:
                assert store.found.wait(30)
            raise KeyError("the coffee is cold")
    except KeyError:
        pass
    # The main process works until the thread has come to its end.
    return 0 if distributed.on_main(lambda: time.sleep(3 * _SlowStore.SECONDS) or "warm") == "warm" else 3


class _SlowStore:
    """A key-value store that takes its time to tell threads what they look for."""

    SECONDS = 0.3

    def __init__(self, store: Any) -> None:
        self._store = store
        self.found = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def check(self, keys: list[str]) -> bool:
        there: bool = self._store.check(keys)
        if there and threading.current_thread() is not threading.main_thread():
            self.found.set()
            time.sleep(self.SECONDS)
        return there


def _raise_at(place: tuple[str, str, int], error: Exception) -> None:
    def throw() -> None:
        raise error

    _at(place, throw)


def _at(place: tuple[str, str, int], act: Any) -> None:
    """Let a call of a function do something else; this process is not used for anything after it."""
    where, name, number = place
    try:
        owner: Any = importlib.import_module(where)
    except ModuleNotFoundError:
        module, _, cls = where.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
    plain, calls = getattr(owner, name), []

    def called(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            act()
        return plain(*args, **options)

    setattr(owner, name, called)
