"""The C kernel of deformable attention against the oracle, and what becomes of its library on the way to it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfuse.ops import deformable_attention
from layerfuse.ops.deformable import compiled, native
from layerfuse.ops.deformable.compiled import compiled_library
from tests.ops.drawn_inputs import drawn_inputs

needs_compiler = pytest.mark.skipif(not native.can_run("cpu"), reason="there is no C compiler")


def _inputs(
    grids: list[tuple[int, int]], *, head_channels: int = 8, num_points: int = 3, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = {"head_channels": head_channels, "num_points": num_points}
    return drawn_inputs(grids, dtype=torch.float32, **sizes, **options)


def _run(
    inputs: tuple[torch.Tensor, ...], grids: list[tuple[int, int]], implementation: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients to value, locations and weights, with value in a dtype, in float64."""
    precision = torch.promote_types(dtype, torch.float32)
    value, locations, weights = (
        tensor.to(kind).requires_grad_() for tensor, kind in zip(inputs, (dtype, precision, precision), strict=True)
    )
    output = deformable_attention(value, grids, locations, weights, implementation=implementation)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    gradients = torch.autograd.grad(output, (value, locations, weights), cotangent)
    return [tensor.detach().double() for tensor in (output, *gradients)]


@settings(max_examples=60)
@given(
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    batch_size=st.integers(1, 2),
    num_queries=st.integers(1, 7),
    num_heads=st.integers(1, 3),
    head_channels=st.sampled_from([1, 3, 8, 16, 30, 64, 70, 130]),
    num_points=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_the_kernel_equals_the_oracle(grids: list[tuple[int, int]], seed: int, **sizes: int) -> None:
    inputs = _inputs(grids, seed=seed, **sizes)
    expected = _run(inputs, grids, "reference", torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        for ours, theirs in zip(_run(inputs, grids, "native", dtype), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance * (1 + float(theirs.abs().max())), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    grids = [(4, 5), (3, 3)]
    value, locations, weights = _inputs(grids, head_channels=40)
    inputs = (value.to(dtype).float(), locations, weights)
    for ours, theirs in zip(_run(inputs, grids, "native", dtype), _run(inputs, grids, "reference", dtype), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_inputs_may_have_any_strides() -> None:
    grids = [(4, 5), (3, 3)]
    inputs = _inputs(grids)
    apart = tuple(torch.stack((tensor, tensor + 1), dim=-1)[..., 0].transpose(0, 1) for tensor in inputs)
    strided = tuple(tensor.contiguous().transpose(0, 1) for tensor in apart)
    assert not any(tensor.is_contiguous() for tensor in strided)
    output = deformable_attention(strided[0], grids, strided[1], strided[2], implementation="native")
    torch.testing.assert_close(output, deformable_attention(inputs[0], grids, *inputs[1:], implementation="native"))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    deformable_attention(leaves[0], grids, *leaves[1:], implementation="native").sum().backward()  # strides of zero
    deformable_attention(leaves[0], grids, *leaves[1:], implementation="reference").sum().neg().backward()
    for leaf in leaves:
        torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), atol=1e-5, rtol=0)


@pytest.mark.parametrize("empty", ["batch_size", "num_queries"])
def test_nothing_to_attend_to_is_no_error(empty: str) -> None:
    grids = [(2, 3)]
    inputs = _inputs(grids, **{empty: 0})
    for ours, theirs in zip(
        _run(inputs, grids, "native", torch.float32), _run(inputs, grids, "gather", torch.float32), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_what_lies_outside_is_zero_whatever_the_map_holds() -> None:
    value, locations, weights = _inputs([(2, 3)])
    outside = torch.full_like(locations, 7.0)
    read = deformable_attention(value * torch.nan, [(2, 3)], outside, weights, implementation="native")
    assert torch.equal(read, torch.zeros_like(read))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("batch_size", "num_heads"), [(1, 1), (1, 3), (3, 5)])
def test_any_number_of_threads_gives_the_same_numbers(
    batch_size: int, num_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = [(4, 5), (3, 3)]
    inputs = _inputs(grids, batch_size=batch_size, num_heads=num_heads, num_queries=11)
    alone = _run(inputs, grids, "native", torch.float32)
    monkeypatch.setattr("layerfuse.ops.deformable.native._LEAST_WORK", 1)
    for ours, theirs in zip(_run(inputs, grids, "native", torch.float32), alone, strict=True):
        assert torch.equal(ours, theirs)


def test_threads_and_forks_may_call_it_at_the_same_time() -> None:
    grids = [(4, 5), (3, 3)]
    inputs = _inputs(grids)
    expected = _run(inputs, grids, "native", torch.float32)
    results: list[list[torch.Tensor]] = []
    together = [
        threading.Thread(target=lambda: results.append(_run(inputs, grids, "native", torch.float32))) for _ in range(4)
    ]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(ours, theirs) for result in results for ours, theirs in zip(result, expected, strict=True))
    if sys.platform == "linux":
        child = multiprocessing.get_context("fork").Process(target=_attend_in_a_child, args=(inputs, expected[0]))
        child.start()
        child.join(60)
        assert child.exitcode == 0


def _attend_in_a_child(inputs: tuple[torch.Tensor, ...], expected: torch.Tensor) -> None:
    output = deformable_attention(inputs[0], [(4, 5), (3, 3)], inputs[1], inputs[2], implementation="native")
    os._exit(0 if torch.equal(output.double(), expected) else 1)


# The library


SOURCE = "int answer(void) { return NUMBER; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    path = tmp_path / "answer.c"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def _answer(source: Path, number: int = 42) -> int | None:
    library = compiled_library(source, [f"NUMBER={number}"])
    return None if library is None else library.answer()


def _libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "layerfuse" / "native").iterdir())


@needs_compiler
def test_a_library_is_made_once_and_again_for_other_source_or_flags(source: Path, tmp_path: Path) -> None:
    assert _answer(source) == 42
    first = _libraries(tmp_path)
    made = first[0].stat().st_mtime_ns
    assert _answer(source) == 42
    assert _libraries(tmp_path) == first and first[0].stat().st_mtime_ns == made
    assert _answer(source, 43) == 43
    source.write_text(SOURCE.replace("NUMBER", "-NUMBER"), encoding="utf-8")
    assert _answer(source) == -42
    assert len(_libraries(tmp_path)) == 3
    assert (tmp_path / "cache" / "layerfuse" / "native").stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"no library", None])
def test_a_damaged_library_is_made_anew(source: Path, tmp_path: Path, content: bytes | None) -> None:
    assert _answer(source) == 42
    (path,) = _libraries(tmp_path)
    whole = path.read_bytes()
    path.unlink()  # this process uses that file
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert _answer(source) == 42
    (again,) = _libraries(tmp_path)
    assert len(again.read_bytes()) == len(whole)


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, since others import torch for seconds")
def test_two_processes_may_make_it_at_once(source: Path, tmp_path: Path) -> None:
    both = [multiprocessing.get_context("fork").Process(target=_answer_in_a_child, args=(source,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [42, 42]
    # A compiler need not give the same bytes twice; no draft is left behind.
    assert {path.suffix for path in _libraries(tmp_path)} == {".so"}


def _answer_in_a_child(source: Path) -> None:
    os._exit(_answer(source) or 0)


@needs_compiler
@pytest.mark.parametrize("unfit", ["others may write", "a file stands there"])
def test_a_folder_that_is_not_the_users_own_is_left_alone(source: Path, tmp_path: Path, unfit: str) -> None:
    folder = tmp_path / "cache" / "layerfuse" / "native"
    folder.parent.mkdir(parents=True)
    if unfit == "a file stands there":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert _answer(source) == 42
    assert folder.is_file() or not _libraries(tmp_path)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("PATH", "", "there is no C compiler"),
        ("CC", "false", "false fails"),
        (compiled.SWITCH, "0", f"{compiled.SWITCH} is 0"),
    ],
)
def test_without_a_library_the_log_says_why(
    source: Path,
    variable: str,
    value: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.INFO, logger="layerfuse"):
        assert _answer(source) is None
    assert reason in caplog.text and "answer.c is not compiled, a slower way is taken" in caplog.text


@needs_compiler
def test_source_that_does_not_compile_is_no_error(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source.write_text("no C\n", encoding="utf-8")
    with caplog.at_level(logging.INFO, logger="layerfuse"):
        assert _answer(source) is None
    assert "the compiler fails" in caplog.text and _libraries(tmp_path) == []


def test_without_a_compiler_gather_is_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    grids = [(4, 5), (3, 3)]
    inputs = _inputs(grids)
    expected = _run(inputs, grids, "gather", torch.float32)
    native._library.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    try:
        with caplog.at_level(logging.INFO, logger="layerfuse"):
            for implementation in ("auto", "native", "auto"):
                for ours, theirs in zip(_run(inputs, grids, implementation, torch.float32), expected, strict=True):
                    assert torch.equal(ours, theirs)
        assert caplog.text.count("there is no C compiler") == 1
    finally:
        native._library.cache_clear()
