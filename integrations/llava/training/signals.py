"""Runs that are told to stop: a signal becomes a checkpoint and an exit code that tells who asked.

SIGTERM, SIGUSR1 (schedulers) and the first Ctrl-C finish the step in progress and write a checkpoint; before the first
step and between stages there is nothing to save, and the run ends at once. A second Ctrl-C kills the process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["EXIT_INTERRUPTED", "EXIT_REQUEUE", "RunInterrupted", "StopRequest", "start_deaf", "stop_requests"]

EXIT_REQUEUE = 75
"""Exit code of a run that a scheduler stopped and that can go on: EX_TEMPFAIL of sysexits.h."""

EXIT_INTERRUPTED = 130
"""Exit code of a run that was stopped by Ctrl-C and can go on: what shells say of SIGINT; nobody requeues it."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

# torchrun passes on the SIGINT that the terminal has sent to everyone already.
_SAME = 2.0


class RunInterrupted(Exception):  # noqa: N818 (no error: the run did what it was told)
    """Raised when a run has stopped on request and its checkpoint is written; `exit_code` is for the command line."""

    def __init__(self, message: str, exit_code: int = EXIT_REQUEUE) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.received = False
        self.exit_code = EXIT_REQUEUE
        self._at = 0.0
        self._nothing_to_save = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal: remember it, for the step in progress is finished first; or stop where there is none."""
        if number == signal.SIGINT:
            launched = "TORCHELASTIC_RUN_ID" in os.environ
            if self.received and not (launched and time.monotonic() - self._at < _SAME):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            if not launched:
                # Also where Python's own handlers do not get a turn, deep inside a computation.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.received:
            self.received, self._at = True, time.monotonic()
            self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE
        self._stop_if_nothing_to_save()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While the block runs there is nothing to save: a request that arrives or has arrived ends it at once."""
        self._nothing_to_save = True
        try:
            self._stop_if_nothing_to_save()
            yield
        finally:
            self._nothing_to_save = False

    def _stop_if_nothing_to_save(self) -> None:
        if self.received and self._nothing_to_save:
            self._nothing_to_save = False
            raise RunInterrupted(
                "stopped on request before the next step was made, so nothing had to be saved; start the same command "
                "again to go on.",
                self.exit_code,
            )


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 (where the system has it) and Ctrl-C into a request while the block runs.

    In a thread other than the main one, where signals do not arrive, the request is never received.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # A shell that starts a job in the background has it ignore Ctrl-C, and means it.
    heard = [n for n in _SIGNALS if not (n == signal.SIGINT and signal.getsignal(n) == signal.SIG_IGN)]
    previous = {number: signal.signal(number, request) for number in heard}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            # None: set by somebody else than Python, and not to be set from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def start_deaf(prepare: Callable[[int], None] | None, worker: int) -> None:
    """Let a process that loads data leave requests to stop to the process that trains.

    A scheduler's signal reaches them all, as Ctrl-C does, and a run whose loaders died could not finish its step.
    `prepare` is the `worker_init_fn` that the loader had.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if prepare is not None:
        prepare(worker)
