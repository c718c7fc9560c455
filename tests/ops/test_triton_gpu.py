"""The Triton kernels on a GPU: against the oracle, in a CUDA graph, without a wait, with torch's switches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from layerfuse.ops import deformable_attention

pytestmark = pytest.mark.gpu

GRIDS = [(24, 24), (24, 24), (7, 12), (1, 5)]
# Of the largest number of each result: rounding to a type, plus what float32 sums of hundreds of numbers differ in.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _supported() -> None:
    from layerfuse.ops.deformable import triton

    assert triton.can_run("cuda"), "this GPU, or this torch, has no Triton"


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(
    dtype: torch.dtype, *, batch_size: int = 2, num_queries: int = 100, num_heads: int = 3, head_channels: int = 64
) -> list[torch.Tensor]:
    """Value, locations (some of them outside) and weights, on the GPU.

    Places are multiples of 2**-10: between which cells they lie is the same in any precision.
    """
    points = (batch_size, num_queries, num_heads, len(GRIDS), 4)
    rows = sum(height * width for height, width in GRIDS)
    precise = torch.promote_types(dtype, torch.float32)
    return [
        torch.randn(batch_size, rows, num_heads, head_channels, device="cuda").to(dtype).requires_grad_(),
        (torch.randint(-50, 1075, (*points, 2), device="cuda") / 1024).to(precise).requires_grad_(),
        torch.randn(points, device="cuda").to(precise).requires_grad_(),
    ]


def _results(inputs: list[torch.Tensor], cotangent: torch.Tensor, implementation: str = "triton") -> list[torch.Tensor]:
    output = deformable_attention(inputs[0], GRIDS, *inputs[1:], implementation=implementation)
    return [output, *torch.autograd.grad(output, inputs, cotangent)]


def _assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], dtype: torch.dtype) -> None:
    for result, expected in zip(ours, theirs, strict=True):
        error = (result.double() - expected.double()).abs().max() / expected.abs().max()
        assert error.item() <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("head_channels", [1, 3, 64, 72, 80, 128, 1024])
def test_triton_equals_the_oracle(dtype: torch.dtype, head_channels: int) -> None:
    inputs = _inputs(dtype, head_channels=head_channels)
    cotangent = torch.randn(2, 100, 3 * head_channels, device="cuda").to(dtype)
    precise = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = _results(precise, cotangent.double(), "reference")
    _assert_close(_results(inputs, cotangent), expected, dtype)


def test_triton_reads_values_beyond_32_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    heads = 2**31 // (sum(height * width for height, width in GRIDS) * 64) + 1
    if free < 2.5 * 2**34:
        pytest.skip("the GPU has no room for a value and gradient of 2**31 numbers")
    # The last head of an image with more elements than 32 bits can number, in memory that no other head has filled.
    inputs = _inputs(torch.bfloat16, batch_size=1, num_queries=1, num_heads=heads)
    cotangent = torch.randn(1, 1, heads * 64, device="cuda").bfloat16()
    last = [tensor.detach()[:, :, -1:].double().requires_grad_() for tensor in inputs]
    ours = _results(inputs, cotangent)
    ours = [ours[0][..., -64:], *(gradient[:, :, -1:] for gradient in ours[1:])]
    _assert_close(ours, _results(last, cotangent[..., -64:].double(), "reference"), torch.bfloat16)


def test_triton_never_waits_for_the_gpu() -> None:
    inputs = _inputs(torch.bfloat16)
    cotangent = torch.randn(2, 100, 192, device="cuda").bfloat16()
    _results(inputs, cotangent)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _results(inputs, cotangent)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_triton_runs_in_a_cuda_graph() -> None:
    inputs = _inputs(torch.bfloat16)
    cotangent = torch.randn(2, 100, 192, device="cuda").bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _results(inputs, cotangent)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _results(inputs, cotangent)
    with torch.no_grad():
        for tensor, other in zip(inputs, _inputs(torch.bfloat16), strict=True):
            tensor.copy_(other)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    _assert_close(captured, _results(inputs, cotangent), torch.bfloat16)


def test_triton_holds_no_copy_of_value_in_float32() -> None:
    inputs = [tensor.detach() for tensor in _inputs(torch.bfloat16, batch_size=32, num_queries=8)]
    deformable_attention(inputs[0], GRIDS, *inputs[1:], implementation="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = deformable_attention(inputs[0], GRIDS, *inputs[1:], implementation="triton")
    assert torch.cuda.max_memory_allocated() - before <= output.nbytes + 1024


def test_triton_in_torchs_compiler_equals_itself() -> None:
    inputs = _inputs(torch.bfloat16)
    cotangent = torch.randn(2, 100, 192, device="cuda").bfloat16()
    compiled = torch.compile(deformable_attention, fullgraph=True)
    output = compiled(inputs[0], GRIDS, *inputs[1:], implementation="triton")
    ours = [output, *torch.autograd.grad(output, inputs, cotangent)]
    _assert_close(ours, _results(inputs, cotangent), torch.bfloat16)


def test_triton_yields_to_a_deterministic_path(_deterministic: None) -> None:
    inputs = _inputs(torch.bfloat16)
    cotangent = torch.randn(2, 100, 192, device="cuda").bfloat16()
    first = _results(inputs, cotangent)
    for path in ("triton", "auto", "gather"):
        for once, again in zip(first, _results(inputs, cotangent, path), strict=True):
            assert torch.equal(once, again)


def test_auto_takes_triton() -> None:
    inputs = [tensor.detach() for tensor in _inputs(torch.bfloat16)]
    expected = deformable_attention(inputs[0], GRIDS, *inputs[1:], implementation="triton")
    assert torch.equal(deformable_attention(inputs[0], GRIDS, *inputs[1:]), expected)
