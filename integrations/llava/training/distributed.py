"""Agreement among the processes of a run: on work that one does for all, requests to stop, and failures.

A failure of one process reaches all of them within seconds. The one that fails writes what happened onto the run's
board (torch.distributed's key-value store); the others look there while they wait for work of the main process, when a
collective breaks, and in a thread of their own, for a collective can also wait for ever.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import distributed_c10d

__all__ = ["ProcessFailedError", "any_process", "on_main", "shared_failures"]

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_LOOK = 0.1  # seconds between two looks at the board
_GRACE = 10.0  # seconds in which a process can end by itself once another one has failed
_PEER_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


class ProcessFailedError(RuntimeError):
    """Raised where another process of the run has failed; the message quotes that process.

    Args:
        process: its rank; None if it ended without a word.
        kind: name of its exception's class.
        text: message of its exception.
        traceback: as it would have been printed there.
    """

    def __init__(self, process: int | None, kind: str, text: str, traceback: str = "") -> None:
        super().__init__(process, kind, text, traceback)
        self.process, self.kind, self.text, self.traceback = process, kind, text, traceback

    def __str__(self) -> str:
        if self.process is None:
            return f"another process of this run ended without a word (was it killed, was memory short?): {self.text}"
        where = f"\n\nThere:\n{self.traceback.rstrip()}" if self.traceback else ""
        return f"process {self.process} failed: {self.kind}: {self.text}{where}"


class _Block:
    """What a run says of one block of `shared_failures`, under keys of its own: nothing of it reaches a later block.

    The thread that watches a block can still be looking when the next one begins.
    """

    def __init__(self, board: _Board, number: int) -> None:
        self.store, self.rank, self.size, self.number = board.store, board.rank, board.size, number
        self.num_results = 0
        self.heard: tuple[ProcessFailedError, BaseException | None] | None = None

    def key(self, name: str) -> str:
        """Key of a value of this block."""
        return f"layerfuse/{self.number}/{name}"

    def publish(self, error: BaseException, same: tuple[type[BaseException], ...]) -> None:
        """Tell the others of this process's failure, if it is the first, and let them read it before the store ends."""
        with suppress(RuntimeError):  # a store that is gone has nobody left to tell
            if self.store.add(self.key("failures"), 1) > 1:
                self.store.add(self.key("heard"), 1)
                return
            own = None
            if isinstance(error, same):
                with suppress(pickle.PicklingError, TypeError, AttributeError):
                    own = pickle.dumps(error)
            where = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self.set(self.key("failure"), (self.rank, type(error).__name__, str(error), where, own))
            deadline = time.monotonic() + _GRACE / 2
            while self.store.add(self.key("heard"), 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(_LOOK / 2)

    def set(self, key: str, value: Any) -> None:
        """Write a value that can be pickled."""
        self.store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # its bytes are taken, too

    def leave(self) -> None:
        """Let the process that holds the store end last; else others that still read there would take it for dead."""
        key = self.key("left")
        left = self.store.add(key, 1)
        while self.rank == 0 and left < self.size and self.look() is None:
            time.sleep(_LOOK / 10)
            left = self.store.add(key, 0)
        self.raise_if_heard()

    def look(self) -> tuple[ProcessFailedError, BaseException | None] | None:
        """Failure of another process, in its words, and the exception itself where all are to raise it; None so far."""
        if self.heard is None:
            with suppress(RuntimeError):  # the store went with its process; then there is nothing more to hear
                if self.store.check([self.key("failure")]):
                    rank, kind, text, where, own = pickle.loads(self.store.get(self.key("failure")))
                    if rank == self.rank:
                        return None
                    error = None
                    with suppress(pickle.UnpicklingError, TypeError, AttributeError, ImportError):
                        error = pickle.loads(own) if own is not None else None
                    # A message to a user says where it comes from without a traceback.
                    self.heard = ProcessFailedError(rank, kind, text, "" if error is not None else where), error
                    self.store.add(self.key("heard"), 1)
        return self.heard

    def raise_if_heard(self, cause: BaseException | None = None) -> None:
        """Raise the failure of another process, if there is one."""
        heard = self.look()
        if heard is None:
            return
        failure, error = heard
        if error is None:
            raise failure from cause
        _log.error("process %d stops, since process %s failed", self.rank, failure.process)
        raise error from failure


class _Board:
    """The key-value store of the process group, through a connection that nobody else waits on."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.store = distributed_c10d._get_default_store().clone()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.num_blocks = 0
        self.block: _Block | None = None
        self.cpu_group: Any = None

    def open_block(self) -> _Block:
        """Begin a block. All processes count their blocks alike."""
        self.num_blocks += 1
        self.block = _Block(self, self.num_blocks)
        return self.block


_boards: list[_Board] = []


def _board() -> _Board | None:
    """The board of the present process group; None for a single process."""
    state = PartialState()
    if state.num_processes == 1 or not dist.is_initialized():
        return None
    group = dist.group.WORLD
    if not _boards or _boards[0].group is not group:
        assert group is not None
        _boards[:] = [_Board(group)]
    return _boards[0]


class shared_failures(AbstractContextManager[None]):  # noqa: N801 (used as a function)
    """Lets every process of a run end when one fails in the block; every process has to enter it.

    The one that fails raises its exception. The others raise within seconds, wherever they are: the same one if it is
    of the classes in `same`, else `ProcessFailedError`. A process that cannot, because it sits in a collective which
    waits for ever, is ended with exit code 1, the message on stderr.
    """

    def __init__(self, *, same: tuple[type[BaseException], ...] = ()) -> None:
        self.same = same
        self.board: _Board | None = None
        self.done = threading.Event()

    def __enter__(self) -> None:
        board = _board()
        if board is not None and board.block is None:
            self.board = board
            watched = (board.open_block(), self.done)
            threading.Thread(target=_watch, args=watched, name="failures of others", daemon=True).start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.board is None:
            return
        block, self.board.block = self.board.block, None
        assert block is not None
        try:
            if isinstance(error, RuntimeError) and not isinstance(error, ProcessFailedError):
                # What breaks in a collective is seldom the cause.
                block.raise_if_heard(error)
                if _PEER_GONE.search(str(error)):
                    gone = ProcessFailedError(None, type(error).__name__, str(error))
                    block.publish(gone, self.same)
                    raise gone from error
            if error is not None and block.heard is None:
                block.publish(error, self.same)
            elif error is None:
                block.leave()
        finally:
            self.done.set()


def _watch(block: _Block, done: threading.Event) -> None:
    """Look for failures of others; end this process if it does not end by itself."""
    while not done.wait(_LOOK):
        heard = block.look()
        if heard is not None:
            if not done.wait(_GRACE):
                _log.error("%s\nprocess %d waited for it and is ended.", heard[0], block.rank)
                logging.shutdown()
                os._exit(1)
            return


def on_main(work: Callable[[], Result]) -> Result:
    """Result of a work that the main process does for all, however long it takes; every process has to call this.

    The result can be pickled. If the work raises, the others raise as `shared_failures` says.
    """
    board = _board()
    if board is None:
        return work()
    with shared_failures():
        block = board.block
        assert block is not None
        block.num_results += 1
        key = block.key(f"result/{block.num_results}")
        if block.rank == 0:
            result = work()
            block.set(key, result)
        else:
            while not block.store.check([key]):
                block.raise_if_heard()
                time.sleep(_LOOK / 5)
            result = pickle.loads(block.store.get(key))
        # Nobody goes on before all have read, so that the result need not stay.
        if block.store.add(f"{key}/read", 1) == block.size:
            block.store.delete_key(key)
    return result


def any_process(flag: bool) -> bool:
    """Whether any process says yes, once all have called this; no device is waited for."""
    board = _board()
    if board is None:
        return flag
    if board.cpu_group is None:
        board.cpu_group = board.group if "gloo" in dist.get_backend(board.group) else dist.new_group(backend="gloo")
    together = torch.tensor(int(flag))
    dist.all_reduce(together, dist.ReduceOp.MAX, group=board.cpu_group)
    return bool(together.item())
