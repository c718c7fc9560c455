"""Runs Python in a process of its own, as a user would: with the project on its path, offline, on one thread."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.source_support import ROOT

__all__ = ["run_python", "run_ready_python"]


def run_python(*arguments: str, folder: Path) -> str:
    """Run Python with arguments in a folder, and give what it printed; it has to end without error."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=_environment(), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\nin {' '.join(arguments)}"
    return result.stdout


def run_ready_python(*arguments: str, folder: Path) -> str:
    """The same for a file or `-c` and code, by a Python that has imported the libraries, and nothing of ours."""
    if not hasattr(os, "fork"):
        return run_python(*arguments, folder=folder)
    ready = _ready_python()
    assert ready.stdin is not None and ready.stdout is not None
    ready.stdin.write(json.dumps([arguments, str(folder)]) + "\n")
    ready.stdin.flush()
    code, output, errors = json.loads(ready.stdout.readline())
    assert code == 0, f"{output}\n{errors}\nin {' '.join(arguments)}"
    return str(output)


@functools.cache
def _ready_python() -> subprocess.Popen[str]:
    """Started when it is first asked for."""
    started = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ready_python.py"))],
        env=_environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(started.communicate)
    return started


def _environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
