"""Two processes (gloo, CPU) for a test, in a second: forked from one that has imported everything, and nothing else.

`python process_pairs.py` is that one. It reads jobs, lines of JSON, and answers each with a line: how its two processes
ended, after how many seconds, and what they said.
"""

from __future__ import annotations

import faulthandler
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ended", "Nursery"]

_IMPORTED = ("integrations.llava.cli.train", "integrations.llava.modeling.lora", "torch.utils.tensorboard")
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
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([job, *arguments]) + "\n")
        self.process.stdin.flush()
        first, second = json.loads(self.process.stdout.readline())
        return Ended(*first), Ended(*second)

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    answers = os.dup(1)
    os.dup2(2, 1)  # what others print is no answer
    for line in sys.stdin:
        os.write(answers, (json.dumps(_pair(*json.loads(line))) + "\n").encode())


def _pair(job: str, *arguments: Any) -> list[tuple[int, float, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / rank for rank in "01"]
        running = {_fork(rank, port, said[rank], job, arguments): rank for rank in (0, 1)}
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
        return [(*ended[rank], said[rank].read_text(encoding="utf-8", errors="replace")) for rank in (0, 1)]


def _fork(rank: int, port: str, said: Path, job: str, arguments: tuple[Any, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(file=2)
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
