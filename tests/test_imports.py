"""What `import layerfuse` loads, and what it may cost beyond torch."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("open_clip", "transformers", "accelerate", "timm", "torchvision", "matplotlib", "skimage", "draccus")
# Measured on 2 cores: about 0.3 s. Wide enough for a busy machine, narrow enough to notice a heavy import.
MAX_SECONDS = 5.0

REPORT = """
import sys, time
import torch
started = time.perf_counter()
import {module}
print(time.perf_counter() - started)
print(" ".join(name for name in {heavy!r} if name in sys.modules))
"""


def run(module: str) -> tuple[float, list[str]]:
    """Import a module in a Python of its own; give the seconds it took after torch, and what it loaded."""
    code = REPORT.format(module=module, heavy=HEAVY)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    seconds, loaded = result.stdout.splitlines()
    return float(seconds), loaded.split()


def test_importing_layerfuse_loads_no_model_library() -> None:
    seconds, loaded = run("layerfuse")
    assert loaded == []
    assert seconds < MAX_SECONDS


@pytest.mark.parametrize("module", ["layerfuse.backbones", "layerfuse.fusers", "layerfuse.ops", "layerfuse.testing"])
def test_importing_a_part_loads_no_model_library(module: str) -> None:
    assert run(module)[1] == []


@pytest.mark.parametrize("name", ["layerfuse", "layerfuse.backbones", "layerfuse.fusers", "integrations.llava"])
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__
    assert [public for public in module.__all__ if not hasattr(module, public)] == []
    # A lazy name that is also a submodule's would turn into the module once that is imported.
    assert [public for public in module.__all__ if inspect.ismodule(getattr(module, public))] == []


def test_help_of_the_command_line_loads_no_model_library() -> None:
    # -X importtime lists every imported module on stderr: "import time: self | cumulative | name".
    command = [sys.executable, "-X", "importtime", "-m", "integrations.llava", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "demo" in result.stdout
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert loaded.isdisjoint(HEAVY)
