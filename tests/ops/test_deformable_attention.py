"""The paths of deformable attention against each other, against arithmetic done by hand, and at their edges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from layerfuse.ops import IMPLEMENTATIONS, deformable_attention
from tests.ops.drawn_inputs import drawn_inputs

PATHS = tuple(name for name in IMPLEMENTATIONS if name != "auto")
Inputs = tuple[torch.Tensor, list[tuple[int, int]], torch.Tensor, torch.Tensor]


def _inputs(grids: list[tuple[int, int]], **options: Any) -> Inputs:
    value, locations, weights = drawn_inputs(grids, **options)
    return value, grids, locations, weights


def _run(inputs: Inputs, implementation: str) -> list[torch.Tensor]:
    """Output and gradients to value, locations and weights."""
    value, grids, locations, weights = inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (value, locations, weights)]
    output = deformable_attention(leaves[0], grids, leaves[1], leaves[2], implementation=implementation)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


grid_lists = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(
    grids=grid_lists,
    batch_size=st.integers(1, 3),
    num_queries=st.integers(1, 7),
    num_heads=st.integers(1, 4),
    head_channels=st.integers(1, 5),
    num_points=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_paths_agree_in_output_and_gradients(
    grids: list[tuple[int, int]],
    batch_size: int,
    num_queries: int,
    num_heads: int,
    head_channels: int,
    num_points: int,
    seed: int,
) -> None:
    inputs = _inputs(
        grids,
        batch_size=batch_size,
        num_queries=num_queries,
        num_heads=num_heads,
        head_channels=head_channels,
        num_points=num_points,
        seed=seed,
    )
    results = {path: _run(inputs, path) for path in PATHS}
    for first, second in itertools.combinations(PATHS, 2):
        for ours, theirs in zip(results[first], results[second], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("implementation", PATHS)
def test_gradients_equal_finite_differences(implementation: str) -> None:
    value, grids, locations, weights = _inputs(
        [(3, 2), (1, 4)], batch_size=1, num_queries=2, num_heads=2, head_channels=2, num_points=2
    )
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda v, x, w: deformable_attention(v, grids, x, w, implementation=implementation), leaves
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cell_centres_read_cells_and_edges_fade_to_zero(implementation: str) -> None:
    height, width = 2, 3
    value = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 6, 1, 1)
    centres = [((x + 0.5) / width, (y + 0.5) / height) for y in range(height) for x in range(width)]
    points = [*centres, (0.0, 0.25), (1.0, 0.25), (0.5, 0.5), (-0.5 / width, 0.25), (5.0, 5.0), (1.0, 1.0)]
    locations = torch.tensor(points, dtype=torch.float64).view(1, len(points), 1, 1, 1, 2)
    weights = torch.full((1, len(points), 1, 1, 1), 2.0, dtype=torch.float64)
    read = deformable_attention(value, [(height, width)], locations, weights, implementation=implementation)
    # Half a cell outside the outermost centres, half of the value is left; one whole cell outside, none.
    expected = [1, 2, 3, 4, 5, 6, 0.5, 1.5, 3.5, 0, 0, 1.5]
    torch.testing.assert_close(read.flatten(), 2 * torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("implementation", PATHS)
def test_heads_levels_and_images_are_not_mixed_up(implementation: str) -> None:
    grids = [(2, 2), (1, 3), (1, 3), (4, 1)]
    value, _, locations, weights = _inputs(grids, batch_size=2, num_heads=2, num_queries=3)
    full = deformable_attention(value, grids, locations, weights, implementation=implementation)
    starts = [0, 4, 7, 10, 14]
    for image, head in itertools.product(range(2), range(2)):
        parts = [
            deformable_attention(
                value[image : image + 1, starts[level] : starts[level + 1], head : head + 1],
                [grids[level]],
                locations[image : image + 1, :, head : head + 1, level : level + 1],
                weights[image : image + 1, :, head : head + 1, level : level + 1],
                implementation=implementation,
            )
            for level in range(4)
        ]
        torch.testing.assert_close(full[image : image + 1, :, head * 4 : head * 4 + 4], sum(parts))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_value_and_is_computed_in_float32(dtype: torch.dtype, implementation: str) -> None:
    value, grids, locations, weights = _inputs([(4, 3), (2, 2)], dtype=torch.float32)
    value = value.to(dtype)
    output = deformable_attention(value, grids, locations, weights, implementation=implementation)
    assert output.dtype == dtype
    precise = deformable_attention(
        value.double(), grids, locations.double(), weights.double(), implementation="reference"
    )
    torch.testing.assert_close(output, precise.to(dtype))


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("wild", [1e30, -1e30])
def test_points_very_far_outside_read_zero(wild: float, implementation: str) -> None:
    value, grids, locations, weights = _inputs([(3, 3)], dtype=torch.float32)
    output = deformable_attention(
        value, grids, torch.full_like(locations, wild), weights, implementation=implementation
    )
    torch.testing.assert_close(output, torch.zeros_like(output))


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_location_shows_in_its_query_and_nowhere_else(broken: float, implementation: str) -> None:
    value, grids, locations, weights = _inputs([(3, 3)], dtype=torch.float32)
    locations[0, 1, 2, 0, 0, 0] = broken
    is_nan = deformable_attention(value, grids, locations, weights, implementation=implementation).isnan()
    assert is_nan[0, 1, 8:].all() and is_nan.sum() == 4


@pytest.mark.parametrize("implementation", PATHS)
def test_paths_compile_without_graph_breaks(implementation: str) -> None:
    value, grids, locations, weights = _inputs([(4, 3), (4, 3), (2, 2)], dtype=torch.float32)

    def attend(v: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return deformable_attention(v, grids, x, w, implementation=implementation)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    expected, actual = attend(*leaves), compiled(*leaves)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("implementation", PATHS)
def test_paths_never_ask_for_a_value_on_the_host(implementation: str) -> None:
    # Fake tensors have no data: any .item(), int(tensor) or data-dependent shape raises.
    with FakeTensorMode(allow_non_fake_inputs=False):
        value, locations, weights = torch.empty(2, 10, 3, 4), torch.empty(2, 5, 3, 2, 2, 2), torch.empty(2, 5, 3, 2, 2)
        output = deformable_attention(value, [(2, 3), (2, 2)], locations, weights, implementation=implementation)
        assert output.shape == (2, 5, 12)


def test_auto_takes_the_native_kernel_on_the_cpu() -> None:
    inputs = _inputs([(3, 3)], dtype=torch.float32)
    assert torch.equal(deformable_attention(*inputs), deformable_attention(*inputs, implementation="native"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_paths_agree_on_cuda_without_synchronising(implementation: str, dtype: torch.dtype) -> None:
    value, grids, locations, weights = _inputs([(4, 3), (2, 2)], dtype=dtype)
    expected = deformable_attention(value.double(), grids, locations.double(), weights.double())
    moved = [tensor.cuda() for tensor in (value, locations, weights)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = deformable_attention(moved[0], grids, moved[1], moved[2], implementation=implementation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(output.cpu(), expected.to(dtype))


def test_unknown_implementation_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'cuda'.*is unknown. Known: auto, gather, native, reference, triton"):
        deformable_attention(*_inputs([(2, 2)]), implementation="cuda")


def test_value_must_be_split_into_heads() -> None:
    value, grids, locations, weights = _inputs([(2, 2)])
    with pytest.raises(ValueError, match=r"value has shape \(2, 4, 12\); expected \(B, S, M, C/M\)"):
        deformable_attention(value.flatten(2), grids, locations, weights)


def test_grids_must_cover_the_value_tokens() -> None:
    value, _, locations, weights = _inputs([(2, 2)])
    with pytest.raises(ValueError, match=r"value has 4 tokens, but the grids \(\(2, 3\),\) have 6 together"):
        deformable_attention(value, [(2, 3)], locations, weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:1],
        lambda x: x[:, :, :2],
        lambda x: torch.cat((x, x), dim=3),
        lambda x: x[..., :1],
        lambda x: x[:, :, :, 0],
    ],
    ids=["batch", "heads", "levels", "coordinates", "dimensions"],
)
def test_locations_must_fit_value_and_grids(change: object) -> None:
    value, grids, locations, weights = _inputs([(2, 2)])
    with pytest.raises(ValueError, match=r"locations has shape .*; expected \(B=2, Q, M=3, L=1, K, 2\)"):
        deformable_attention(value, grids, change(locations), weights)  # type: ignore[operator]


def test_weights_must_fit_locations() -> None:
    value, grids, locations, weights = _inputs([(2, 2)])
    with pytest.raises(ValueError, match=r"weights has shape \(2, 5, 3, 1, 1\); expected \(2, 5, 3, 1, 2\)"):
        deformable_attention(value, grids, locations, weights[..., :1])


@pytest.mark.parametrize("limit", [1, 300, 700, 10**6])
def test_a_batch_of_more_lookups_than_can_be_numbered_is_taken_in_parts(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs([(3, 4), (2, 5)], batch_size=5)
    expected = _run(inputs, "gather")
    types: list[torch.dtype] = []
    bag = torch.nn.functional.embedding_bag

    def noted(rows: torch.Tensor, *arguments: torch.Tensor, **options: object) -> torch.Tensor:
        types.append(rows.dtype)
        assert rows.dtype == torch.int64 or rows.numel() <= limit
        return bag(rows, *arguments, **options)  # type: ignore[arg-type, no-any-return]

    monkeypatch.setattr("layerfuse.ops.deformable.gather._MOST_LOOKUPS", limit)
    monkeypatch.setattr("layerfuse.ops.deformable.gather.F.embedding_bag", noted)
    for actual, wanted in zip(_run(inputs, "gather"), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    # An image has 4 corners x 5 queries x 3 heads x 2 levels x 2 points = 240 lookups.
    assert len(types) == {1: 5, 300: 5, 700: 3, 10**6: 1}[limit]
    assert {*types} == {torch.int64 if limit == 1 else torch.int32}


def test_the_batch_that_overflowed_is_taken_in_parts() -> None:
    """512 images at 64x64 with the paper's setting: 512 * 4096 * 16 * 4 * 4 * 4 lookups, on the meta device."""
    grids = [(64, 64)] * 4
    value = torch.empty(512, 4 * 4096, 16, 64, device="meta")
    locations = torch.empty(512, 4096, 16, 4, 4, 2, device="meta")
    output = deformable_attention(value, grids, locations, locations[..., 0], implementation="gather")
    assert output.shape == (512, 4096, 1024)


def test_a_device_without_embedding_bag_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs([(3, 4), (2, 5)])
    expected = _run(inputs, "reference")
    monkeypatch.setattr("layerfuse.ops.deformable.gather._BAG_DEVICES", frozenset())
    monkeypatch.setattr(
        "layerfuse.ops.deformable.gather.F.embedding_bag", lambda *_, **__: pytest.fail("embedding_bag was called")
    )
    for actual, wanted in zip(_run(inputs, "gather"), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
