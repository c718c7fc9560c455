"""The rule that a golden test may be skipped by a user, but not in CI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TEST = """
def test_compares_with_a_recorded_value(goldens):
    assert goldens.is_dir()
"""


@pytest.mark.parametrize(("required", "outcome", "code"), [("0", "1 skipped", 0), ("1", "1 error", 1)])
def test_a_missing_golden_skips_unless_goldens_are_required(
    required: str, outcome: str, code: int, tmp_path: Path
) -> None:
    # A package, since some library installs one of the same name.
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "deprecations.py"):
        shutil.copyfile(ROOT / "tests" / name, tmp_path / "tests" / name)
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "conftest.py").replace(tmp_path / "conftest.py")
    (tmp_path / "test_recorded.py").write_text(TEST)
    environment = os.environ | {
        "LAYERFUSE_GOLDENS": str(tmp_path / "nowhere"),
        "LAYERFUSE_REQUIRE_GOLDENS": required,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stdout
    assert outcome in result.stdout
    assert ("LAYERFUSE_REQUIRE_GOLDENS is set" in result.stdout) == (required == "1")
