"""The Triton kernels in Triton's interpreter against the oracle in float64: output and all gradients, without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.run_support import run_python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton, which comes with torch's CUDA builds for Linux, is not installed",
)


def test_triton_kernels_equal_the_oracle_at_drawn_shapes_and_at_edges(tmp_path: Path) -> None:
    # One process for all, and not this one: Triton chooses between interpreter and compiler when it is imported.
    result = json.loads(run_python(str(Path(__file__).with_name("triton_interpreted.py")), folder=tmp_path))
    assert result["faults"] == []
    assert min(result["counts"][f"drawn {dtype}"] for dtype in ("float32", "bfloat16")) >= 20
    assert {"border float32", "dtype float16", "dtype float64", "int64 bfloat16"} <= set(result["counts"])
