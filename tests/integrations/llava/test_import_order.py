"""When the models register themselves: behind the import that brings transformers along, never in its middle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
REGISTERED = "print(transformers.AutoConfig.for_model('layerfuse_llava').model_type)"


@pytest.mark.parametrize(
    "names",
    [
        "integrations.llava, peft",
        pytest.param("peft, integrations.llava", marks=pytest.mark.slow),
        "integrations.llava, open_clip",
        "open_clip, integrations.llava",
        "integrations.llava, accelerate",
        pytest.param("accelerate, integrations.llava", marks=pytest.mark.slow),
    ],
)
def test_libraries_that_the_models_import_may_come_first_or_last(names: str) -> None:
    """Peft and open_clip import transformers themselves."""
    command = [sys.executable, "-c", f"import {names}, transformers; {REGISTERED}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    assert result.stdout.split() == ["layerfuse_llava"]


LOADED = "LOADED = 'integrations.llava.modeling' in sys.modules\n"


@pytest.mark.parametrize(
    ("place", "end", "found"),
    [
        # A library that is installed is whole before anything else happens.
        ("site-packages", "", "False"),
        # So is one that failed; then its importer goes on without it.
        ("site-packages", "raise ImportError\n", "None"),
        # A user's own module may load a model while it is imported.
        ("own", "AutoConfig.for_model('layerfuse_llava')\n", "True"),
    ],
)
def test_no_library_is_interrupted_in_the_middle_of_its_import(
    place: str, end: str, found: str, tmp_path: Path
) -> None:
    (tmp_path / place / "library").mkdir(parents=True)
    (tmp_path / place / "library" / "__init__.py").write_text("import library.part\nLOADED = library.part.LOADED\n")
    (tmp_path / place / "library" / "part.py").write_text(
        f"import sys\nfrom transformers import AutoConfig\n{LOADED}{end}"
    )
    program = f"""
import contextlib, integrations.llava
LOADED = None
with contextlib.suppress(ImportError):
    from library import LOADED
import transformers
assert not type(transformers.__spec__.loader).__module__.startswith("integrations")
print(LOADED)
{REGISTERED}
"""
    surroundings = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / place}"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True, timeout=600)
    assert result.stdout.split() == [found, "layerfuse_llava"]
