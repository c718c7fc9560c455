"""When the Triton kernels are taken and when gather is, and the bytes that either has to move."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from layerfuse.ops import deformable_attention, least_traffic
from layerfuse.ops.deformable import triton
from layerfuse.ops.deformable.attention import _choose


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_triton_is_what_auto_takes_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_is_supported", lambda: True)
    assert triton.can_run("cuda") and not triton.can_run("cpu")
    assert (_choose("auto", "cuda"), _choose("triton", "cuda"), _choose("gather", "cuda")) == (
        "triton",
        "triton",
        "gather",
    )


def test_triton_gives_way_to_gather_where_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_is_supported", lambda: False)
    assert (_choose("auto", "cuda"), _choose("triton", "cuda")) == ("gather", "gather")


def test_triton_gives_way_to_gather_where_torch_is_deterministic(
    monkeypatch: pytest.MonkeyPatch, deterministic: None
) -> None:
    monkeypatch.setattr(triton, "_is_supported", lambda: True)
    assert not triton.can_run("cuda")
    assert (_choose("auto", "cuda"), _choose("triton", "cuda")) == ("gather", "gather")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert _choose("auto", "cuda") == "gather"


def test_triton_is_supported_where_it_is_installed_and_the_gpu_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    installed, capability = object(), (9, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed if name == "triton" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    is_supported = triton._is_supported.__wrapped__
    assert is_supported()
    capability = (7, 5)
    assert not is_supported()
    installed, capability = None, (9, 0)
    assert not is_supported()


def test_triton_asked_for_on_a_cpu_is_gather() -> None:
    value, locations, weights = torch.rand(1, 6, 2, 4), torch.rand(1, 3, 2, 1, 2, 2), torch.rand(1, 3, 2, 1, 2)
    asked, expected = (
        deformable_attention(value, [(2, 3)], locations, weights, implementation=name) for name in ("triton", "gather")
    )
    assert torch.equal(asked, expected)


def test_least_traffic_reads_each_input_and_writes_each_result_once() -> None:
    value = torch.empty(16, 2304, 16, 64, dtype=torch.bfloat16, device="meta")
    locations = torch.empty(16, 576, 16, 4, 4, 2, device="meta")
    forward, backward = least_traffic(value, locations, locations[..., 0])
    inputs = 75_497_472 + 18_874_368 + 9_437_184
    assert (forward, backward) == (inputs + 18_874_368, 2 * inputs + 18_874_368)
