"""What `import layerfuse` loads, and what it may cost beyond torch."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("open_clip", "transformers", "accelerate", "timm", "torchvision", "matplotlib", "skimage")
# CPU seconds, so that a busy machine does not matter; measured: 0.11.
MAX_SECONDS = 2.0

REPORT = f"""
import sys, time
import torch
started = time.process_time()
import layerfuse
print(time.process_time() - started)
import layerfuse.analysis, layerfuse.testing
print(" ".join(name for name in {HEAVY!r} if name in sys.modules))
"""


def test_importing_layerfuse_loads_no_model_library_and_is_quick() -> None:
    result = subprocess.run(
        [sys.executable, "-c", REPORT], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    seconds, loaded = result.stdout.splitlines()
    assert loaded == ""
    assert float(seconds) < MAX_SECONDS


@pytest.mark.parametrize("name", ["layerfuse", "layerfuse.backbones", "layerfuse.fusers", "integrations.llava"])
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__
    assert [public for public in module.__all__ if not hasattr(module, public)] == []
    # A lazy name that is also a submodule's would turn into the module once that is imported.
    assert [public for public in module.__all__ if inspect.ismodule(getattr(module, public))] == []


def test_help_names_the_commands_and_loads_neither_torch_nor_a_model_library() -> None:
    # -X importtime lists every imported module on stderr: "import time: self | cumulative | name".
    command = [sys.executable, "-X", "importtime", "-m", "integrations.llava", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert all(name in result.stdout for name in ("commands:", "train", "generate", "evaluate", "demo"))
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "integrations.llava" in loaded
    assert loaded.isdisjoint({"torch", *HEAVY})


REGISTERED = "print(transformers.AutoConfig.for_model('layerfuse_llava').model_type)"


@pytest.mark.parametrize(
    "program",
    [
        # Somebody asks whether transformers is there, which is no import of it.
        "import integrations.llava, importlib.util as u; u.find_spec('transformers'); import transformers",
        "import transformers, integrations.llava",
        "import integrations.llava.prompts, integrations.llava.config, integrations.llava.image_layout, transformers",
    ],
)
def test_the_models_are_registered_whoever_is_imported_first(program: str) -> None:
    command = [sys.executable, "-c", f"{program}; {REGISTERED}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    assert result.stdout.split() == ["layerfuse_llava"]


def test_packages_below_the_models_do_not_import_transformers() -> None:
    """They are half imported when it would bring the models in."""
    names = ", ".join(f"integrations.llava.{name}" for name in ("config", "prompts", "image_layout", "synthetic"))
    program = f"import sys, {names}; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("Answerer", "Predictor"), ("Decoding", "SamplingParams"), ("load_answerer", "load_predictor")],
)
def test_names_of_0_1_warn_and_are_the_new_ones(old: str, new: str) -> None:
    llava = importlib.import_module("integrations.llava")
    with pytest.warns(DeprecationWarning, match=f"{old} is now called {new}"):
        assert getattr(llava, old) is getattr(llava, new)


def test_a_program_run_by_its_name_finds_the_models_registered(tmp_path: Path) -> None:
    """`python -m program` runs the package's own file first, while `sys.argv` begins with "-m"."""
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import integrations.llava\n")
    report = "from transformers import AutoConfig\nprint(AutoConfig.for_model('layerfuse_llava').model_type)\n"
    (tmp_path / "program" / "__main__.py").write_text(report)
    surroundings = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "program"]
    result = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True, timeout=600)
    assert result.stdout.split() == ["layerfuse_llava"]
