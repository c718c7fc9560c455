"""Runs that are told to stop: a signal becomes a checkpoint and an exit code that a scheduler can requeue on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .processes import any_process

__all__ = ["EXIT_REQUEUE", "DeafWorker", "RunInterrupted", "StopOnSignal", "StopRequest", "stop_requests"]

EXIT_REQUEUE = 75
"""Exit code of a run that stopped on request and can go on: EX_TEMPFAIL of sysexits.h."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class RunInterrupted(Exception):  # noqa: N818 (no error: the run did what it was told)
    """Raised when a run has stopped on request, its checkpoint written."""


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal: remember it; the step in progress is finished first."""
        self.received = True


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGUSR1 into a request while the block runs; elsewhere than in the main thread, nothing.

    Yields:
        The request, not yet received.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class DeafWorker:
    """Prepares a process that loads data: it leaves requests to stop to the process that trains.

    A scheduler's signal reaches them all, and a run whose loaders died could not finish its step.

    Args:
        prepare: the loader's own `worker_init_fn`, which is called too.
    """

    def __init__(self, prepare: Callable[[int], None] | None) -> None:
        self.prepare = prepare

    def __call__(self, worker: int) -> None:
        """Prepare a worker process."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.prepare is not None:
            self.prepare(worker)


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which any process was asked to stop, with a log entry and a checkpoint.

    Args:
        request: of this process.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Agree with the other processes whether to stop."""
        stop = any_process(self.request.received)
        # A stage at its last step ends by itself.
        if stop and state.global_step < state.max_steps:
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True
        return control
