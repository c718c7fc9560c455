"""Every example runs, offline, in a Python of its own, and prints what its text promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

# File name -> (arguments for a quick run, what it must print).
RUNS: dict[str, tuple[list[str], list[str]]] = {
    "tap_layers.py": (["--layers", "2", "0", "-2"], ["layer 2: map (2, 196, 192)", "11 of 12 blocks; same maps: True"]),
    "fuse_in_ten_lines.py": ([], ["image (1, 3, 224, 224) -> tokens (1, 196, 192)", "FuserCost("]),
    # The published size of MMFuser at LLaVA-1.5's width.
    "compare_fusers.py": (
        ["--time"],
        ["mmfuser         5,190,592     576      1024", "select                  0", "concat"],
    ),
    "train_tiny_llava.py": (
        ["--output", "out", "--num-train", "16", "--steps", "1", "1"],
        ["reloaded FusedLlavaForConditionalGeneration with fuser mmfuser", "answered: "],
    ),
    "write_a_fuser.py": ([], ["tokens (1, 196, 192)", "same after loading: True"]),
}


def run(name: str, arguments: list[str], folder: Path) -> str:
    """Run an example in an empty folder, without network; give what it printed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{name} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_every_example_has_a_run() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(RUNS)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_example_prints_what_it_promises(name: str, tmp_path: Path) -> None:
    arguments, expected = RUNS[name]
    output = run(name, arguments, tmp_path)
    assert [text for text in expected if text not in output] == [], output
