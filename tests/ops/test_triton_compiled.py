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

from layerfuse.ops.deformable import triton as ours

triton = pytest.importorskip("triton", reason="Triton, which comes with torch's CUDA builds for Linux, is not here")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's own assembler is one for Linux")

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _launches(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Name, positional and keyword arguments of every launch, none of which takes place."""
    launches: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, programs: tuple[int]) -> Any:
            return lambda *tensors, **options: launches.append((self.name, tensors, options))

    import layerfuse.ops.deformable as package
    from layerfuse.ops.deformable import _triton_kernels as kernels

    names = ("forward_kernel", "backward_kernel")
    monkeypatch.setattr(package, "_triton_kernels", SimpleNamespace(**{name: Noted(name) for name in names}))
    run()
    monkeypatch.setattr(package, "_triton_kernels", kernels)
    return launches


def _compile(name: str, tensors: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compile a launch as Triton would on an H100: sizes of 1 are constants, multiples of 16 are known to be."""
    from layerfuse.ops.deformable import _triton_kernels as kernels

    options = dict(options)
    launched = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    kernel = getattr(kernels, name)
    given = dict(zip(kernel.arg_names, tensors, strict=False)) | options
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, place)) for place, item in enumerate(value))
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        if value is None or value == 1:
            constants[path] = value
            return "constexpr"
        return "i32" if value < 2**31 else "i64"

    for place, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = given[parameter.name]
        else:
            signature[parameter.name] = describe(given[parameter.name], (place,))
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options=launched)


def _tensors(
    grids: list[tuple[int, int]], dtype: torch.dtype, *, num_heads: int, head_channels: int, num_points: int
) -> Tensors:
    """Gradient of the output, value, locations and weights of two images; they have shapes and no memory."""
    precise = torch.promote_types(dtype, torch.float32)
    points = (2, 40, num_heads, len(grids), num_points)
    return (
        torch.empty(2, 40, num_heads * head_channels, dtype=dtype, device="meta"),
        torch.empty(2, sum(h * w for h, w in grids), num_heads, head_channels, dtype=dtype, device="meta"),
        torch.empty(*points, 2, dtype=precise, device="meta"),
        torch.empty(points, dtype=precise, device="meta"),
    )


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def _both(monkeypatch: pytest.MonkeyPatch, tensors: Tensors, grids: list[tuple[int, int]], **options: Any) -> Any:
    grad, value, locations, weights = tensors

    def run() -> None:
        ours.forward(value, grids, locations, weights)
        ours.backward(grad, value, grids, locations, weights, **options)

    return _launches(monkeypatch, run)


def test_triton_code_at_mmfusers_size_reads_wide_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _tensors([(24, 24)] * 4, torch.bfloat16, num_heads=16, head_channels=64, num_points=4)
    forward, backward = (_compile(*launch) for launch in _both(monkeypatch, tensors, [(24, 24)] * 4))
    for kernel, cells in ((forward, 16), (backward, 4)):
        code = kernel.asm["ptx"]
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", code)) >= cells, "a lane reads 16 bytes"
        assert kernel.metadata.shared == 0 and "bar.sync" not in code, "warps do not wait for one another"
    assert len(re.findall(r"(?:red|atom)\.\S*v4\.f32", backward.asm["ptx"])) == 8, "four floats are added at once"


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float64, (True, True, True)), (torch.float16, (False, False, True))],
)
def test_triton_compiles_where_sizes_are_one_odd_or_beyond_32_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wanted: tuple[bool, bool, bool]
) -> None:
    monkeypatch.setattr(ours, "_MOST_ELEMENTS", 1)
    grids = [(1, 7), (3, 1)]
    tensors = _tensors(grids, dtype, num_heads=1, head_channels=3, num_points=1)
    for name, arguments, options in _both(monkeypatch, tensors, grids, wanted=wanted):
        assert options["INDEX"] == triton.language.int64
        assert _compile(name, arguments, options).asm["cubin"]
