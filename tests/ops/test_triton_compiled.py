"""The Triton kernels compiled for Hopper, which needs no GPU: what a launch asks for is code, and the code is lean.

Triton's interpreter checks no types; this does.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerfuse.ops import deformable
from layerfuse.ops.deformable import triton as ours

triton = pytest.importorskip("triton", reason="Triton, which comes with torch's CUDA builds for Linux, is not here")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's own assembler is one for Linux")

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Hopper:
    """What Triton's compiler asks of a GPU's driver."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "a device that no GPU is"

    def get_current_stream(self, device: str) -> int:
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.compile = kernel.warmup
        self.launches = launches

    def __getitem__(self, programs: tuple[int]) -> Any:
        return lambda *tensors, **options: self.launches.append(self.compile(*tensors, grid=programs, **options))


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The compiled kernels, one per launch of those that the test makes."""
    from layerfuse.ops.deformable import _triton_kernels as kernels

    found: list[Any] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    compiled = {name: Compiled(getattr(kernels, name), found) for name in ("forward_kernel", "backward_kernel")}
    monkeypatch.setattr(deformable, "_triton_kernels", SimpleNamespace(**compiled))
    return found


def _tensors(rows: int, levels: int, dtype: torch.dtype, *, sizes: tuple[int, int, int, int, int]) -> Tensors:
    """Gradient of the output, value, locations and weights; they have shapes and no memory.

    ``sizes`` are B, Q, M, C/M and K.
    """
    batch_size, num_queries, num_heads, head_channels, num_points = sizes
    precise = torch.promote_types(dtype, torch.float32)
    points = (batch_size, num_queries, num_heads, levels, num_points)
    return (
        torch.empty(batch_size, num_queries, num_heads * head_channels, dtype=dtype, device="meta"),
        torch.empty(batch_size, rows, num_heads, head_channels, dtype=dtype, device="meta"),
        torch.empty(*points, 2, dtype=precise, device="meta"),
        torch.empty(points, dtype=precise, device="meta"),
    )


def test_triton_code_at_mmfusers_size_reads_wide_and_waits_for_nobody(launches: list[Any]) -> None:
    grids = [(24, 24)] * 4
    grad, value, locations, weights = _tensors(2304, 4, torch.bfloat16, sizes=(16, 576, 16, 64, 4))
    ours.forward(value, grids, locations, weights)
    ours.backward(grad, value, grids, locations, weights)
    forward, backward = launches
    for kernel, cells in ((forward, 16), (backward, 4)):
        code = kernel.asm["ptx"]
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", code)) >= cells, "a lane reads 16 bytes"
        assert kernel.metadata.shared == 0 and "bar.sync" not in code, "warps do not wait for one another"
    assert len(re.findall(r"(?:red|atom)\.\S*v4\.f32", backward.asm["ptx"])) == 8, "four floats are added at once"


@pytest.mark.parametrize(
    ("dtype", "grids", "sizes", "wanted"),
    [
        (torch.float64, [(1, 7), (3, 1)], (2, 33, 3, 3, 3), (True, True, True)),
        (torch.float16, [(1, 1)], (1, 1, 1, 1, 1), (True, False, True)),
    ],
)
def test_triton_compiles_where_sizes_are_one_odd_or_beyond_32_bits(
    monkeypatch: pytest.MonkeyPatch,
    launches: list[Any],
    dtype: torch.dtype,
    grids: list[tuple[int, int]],
    sizes: tuple[int, int, int, int, int],
    wanted: tuple[bool, bool, bool],
) -> None:
    monkeypatch.setattr(ours, "_MOST_ELEMENTS", 0)
    rows = sum(height * width for height, width in grids)
    grad, value, locations, weights = _tensors(rows, len(grids), dtype, sizes=sizes)
    ours.forward(value, grids, locations, weights)
    ours.backward(grad, value, grids, locations, weights, wanted=wanted)
    assert len(launches) == 2 and all(kernel.asm["cubin"] for kernel in launches)
