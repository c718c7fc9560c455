"""Two processes (gloo, CPU) for a test, or one, in a second: forked from one that has imported everything, no more.

`python process_pairs.py` is that one. It reads jobs, lines of JSON, and answers each with two lines: the ids of its
processes; and how they ended, after how many seconds, and what they said.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import conversion_mapping

__all__ = ["Alone", "Ended", "Nursery"]

_IMPORTED = (
    "integrations.llava.cli.train",
    "integrations.llava.modeling.lora",
    "torch.utils.tensorboard",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
)
_PATIENCE = 120.0


@dataclass(frozen=True)
class Ended:
    """How one of the two processes ended: exit code (negative: by a signal), seconds since the start, all it wrote."""

    code: int
    seconds: float
    output: str

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.0f} s:\n{self.output}"


class Nursery:
    """The process that others are forked from."""

    def __init__(self, root: Path) -> None:
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
            cwd=root,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, job: str, *arguments: Any) -> tuple[Ended, Ended]:
        """Let two processes run `module:function(rank, *arguments)`; what it returns is the exit code."""
        self._ask(2, job, *arguments)
        first, second = self._answer()
        return Ended(*first), Ended(*second)

    @contextmanager
    def alone(self, job: str, *arguments: Any) -> Iterator[Alone]:
        """Let one process run `module:function(0, *arguments)` in a session of its own, without waiting for it."""
        (process,) = self._ask(1, job, *arguments)
        started = Alone(process, self._answer)
        try:
            yield started
        finally:
            started.send(signal.SIGKILL)
            started.wait()

    def _ask(self, *request: Any) -> list[int]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        processes: list[int] = self._answer()
        return processes

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self.process.communicate()


class Alone:
    """A process that runs while the test goes on."""

    def __init__(self, process: int, answer: Callable[[], Any]) -> None:
        self.id, self._answer = process, answer
        self._ended: Ended | None = None

    def runs(self) -> bool:
        """Whether it has not ended."""
        try:
            os.kill(self.id, 0)
        except ProcessLookupError:
            return False
        return True

    def send(self, number: int, *, group: bool = False) -> None:
        """Send it a signal, or to all of its session; nothing happens once it has ended."""
        with suppress(ProcessLookupError):
            if self._ended is None:
                (os.killpg if group else os.kill)(self.id, number)

    def wait(self) -> Ended:
        """Wait until it ends."""
        self._ended = self._ended or Ended(*self._answer()[0])
        return self._ended


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    Image.init()
    # Made when first asked for, of a thousand patterns; every model that is loaded asks for them.
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    # A collection that looks at all that was imported copies its memory in every process.
    gc.collect()
    gc.freeze()
    answers = os.dup(1)
    os.dup2(2, 1)  # what others print is no answer
    for line in sys.stdin:
        _serve_one(answers, *json.loads(line))


def _serve_one(answers: int, processes: int, job: str, *arguments: Any) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(processes)]
        running = {_fork(rank, port, said, job, arguments): rank for rank in range(processes)}
        _write(answers, list(running))
        ended: dict[int, tuple[int, float]] = {}
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                ended[running.pop(pid)] = os.waitstatus_to_exitcode(status), time.monotonic() - started
            elif time.monotonic() - started > _PATIENCE:
                for left in running:
                    os.kill(left, signal.SIGABRT)  # says where each of its threads stands, see faulthandler
            else:
                time.sleep(0.01)
        outputs = [path.read_text(encoding="utf-8", errors="replace") for path in said]
        _write(answers, [(*ended[rank], output) for rank, output in enumerate(outputs)])


def _write(answers: int, content: Any) -> None:
    left = (json.dumps(content) + "\n").encode()
    while left:
        left = left[os.write(answers, left) :]


def _fork(rank: int, port: str, said: list[Path], job: str, arguments: tuple[Any, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    output = os.open(said[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(file=2)
    if len(said) == 1:
        os.setsid()
    else:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        module, _, function = job.partition(":")
        code = getattr(importlib.import_module(module), function)(rank, *arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
