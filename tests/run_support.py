"""Runs Python in a process of its own, as a user would: with the project on its path, offline, on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.source_support import ROOT

__all__ = ["run_python"]


def run_python(*arguments: str, folder: Path) -> str:
    """Run Python with arguments in a folder, and give what it printed; it has to end without error."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\nin {' '.join(arguments)}"
    return result.stdout
