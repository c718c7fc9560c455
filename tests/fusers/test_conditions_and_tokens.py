"""Fusers with a condition, and with tokens that are no grid; what a fuser's own forward costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import ExtraTokens, Fuser
from layerfuse.testing import random_features


class TextGated(Fuser):
    """Every layer weighted by a vector that stands for the question, behind a class token of the first map."""

    name = "test_text_gated"
    equal_channels = True

    def __init__(self, in_channels: int | Sequence[int], num_layers: int, *, condition_channels: int = 6) -> None:
        super().__init__(in_channels, num_layers)
        self.condition_channels = condition_channels
        self.gate = nn.Linear(condition_channels, num_layers)

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        assert condition is not None
        weights = self.gate(condition).softmax(-1)
        return torch.einsum("bl,blnc->bnc", weights, torch.stack(features.maps, dim=1))


class Pooled(Fuser):
    """The last map, its mean in front of it and two means of the first map behind."""

    name = "test_pooled"

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        mean = features.maps[0].mean(1, keepdim=True)
        return torch.cat([features.maps[-1].mean(1, keepdim=True), features.maps[-1], mean, mean], dim=1)

    def extra_tokens(self, grids: Sequence[Grid]) -> ExtraTokens:
        return ExtraTokens(front=1, behind=2)


class Queries(Fuser):
    """Learned queries that attend to the last map; their tokens are no grid."""

    name = "test_queries"

    def __init__(self, in_channels: int | Sequence[int], num_layers: int, *, num_queries: int = 5) -> None:
        super().__init__(in_channels, num_layers)
        self.queries = nn.Parameter(torch.zeros(num_queries, self.in_channels[-1]))
        self.project = nn.Linear(self.in_channels[-1], self.in_channels[-1], bias=False)

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        maps = self.project(features.maps[-1])[:, None]
        queries = self.queries.expand(len(maps), 1, -1, -1)
        return F.dropout(F.scaled_dot_product_attention(queries, maps, maps)[:, 0], 0.5, self.training)

    def out_grid(self, grids: Sequence[Grid]) -> None:
        return None

    def extra_tokens(self, grids: Sequence[Grid]) -> ExtraTokens:
        return ExtraTokens(front=len(self.queries))


def test_a_condition_reaches_the_fuser() -> None:
    fuser = TextGated(8, 3)
    features, condition = random_features(8, num_layers=3), torch.randn(2, 6)
    weights = fuser.gate(condition).softmax(-1)
    expected = sum(weights[:, layer, None, None] * features[layer] for layer in range(3))
    torch.testing.assert_close(fuser(features, condition), expected)
    torch.testing.assert_close(fuser(features, condition=condition), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_condition_is_read_in_the_fusers_precision(dtype: torch.dtype) -> None:
    fuser = TextGated(8, 3).to(dtype)
    features, condition = random_features(8, num_layers=3), torch.randn(2, 6)
    fused = fuser(features, condition)
    assert fused.dtype == torch.float32
    expected = fuser.fuse(features.to(dtype), condition=condition.to(dtype)).float()
    torch.testing.assert_close(fused, expected, rtol=0, atol=0)
    # Beside maps in the precision of the fuser, the condition alone is converted.
    torch.testing.assert_close(fuser(features.to(dtype), condition), expected.to(dtype))


def test_autocast_chooses_the_precision_of_a_condition() -> None:
    seen: list[torch.dtype] = []

    class Watched(TextGated):
        def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
            assert condition is not None
            seen.extend((features[0].dtype, condition.dtype))
            return super().fuse(features, condition=condition)

    with torch.autocast("cpu", torch.bfloat16):
        Watched(8, 3)(random_features(8, num_layers=3, dtype=torch.bfloat16), torch.randn(2, 6, dtype=torch.float16))
    assert seen == [torch.bfloat16, torch.float16]


def test_a_condition_that_is_missing_or_of_another_shape_is_refused() -> None:
    fuser = TextGated(8, 3)
    features = random_features(8, num_layers=3)
    with pytest.raises(ValueError, match=r"'test_text_gated' needs a condition, \(B=2, D_c=6\): call it with the"):
        fuser(features)
    for shape in ((2, 5), (1, 6), (6,), (2, 1, 6)):
        message = rf"a condition of shape \({', '.join(map(str, shape))},?\); it was built for \(B=2, D_c=6\)"
        with pytest.raises(ValueError, match=message):
            fuser(features, torch.zeros(shape))


@pytest.mark.parametrize(
    ("condition", "kind"),
    [
        *[(torch.ones(2, 6).to(dtype), dtype) for dtype in (torch.bool, torch.int64, torch.complex64)],
        *[("a question", "str"), ([[0.0] * 6] * 2, "list"), (np.zeros((2, 6)), "ndarray")],
    ],
    ids=lambda given: given if isinstance(given, str) else str(getattr(given, "dtype", "list")),
)
def test_a_condition_that_is_no_vectors_is_refused_whatever_the_precision(condition: Any, kind: Any) -> None:
    fuser, features = TextGated(8, 3), random_features(8, num_layers=3)
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context, pytest.raises(ValueError, match=rf"got a condition of type {kind}; it reads .* \(B=2, D_c=6\)"):
            fuser(features, condition)


def test_a_fuser_with_a_condition_compiles_without_a_graph_break() -> None:
    fuser = TextGated(8, 3)
    compiled = torch.compile(fuser, fullgraph=True, backend="eager")
    for batch_size in (2, 3):
        inputs = random_features(8, num_layers=3, batch_size=batch_size), torch.randn(batch_size, 6)
        torch.testing.assert_close(compiled(*inputs), fuser(*inputs))


def test_a_fuser_may_leave_a_condition_out_of_its_signature() -> None:
    class Old(Fuser):
        def fuse(self, features):  # type: ignore[no-untyped-def, override]
            return features.maps[0]

        def flops(self, grids):  # type: ignore[no-untyped-def]
            return 7

    fuser = Old(8, 2)
    features = random_features(8, num_layers=2)
    assert torch.equal(fuser(features), features[0])
    assert fuser.cost(features.grids).flops == 7


def test_tokens_that_belong_to_no_cell_are_counted() -> None:
    features = random_features(8, grids=[(2, 3), (2, 3)])
    pooled, queries = Pooled(8, 2), Queries(8, 2, num_queries=7).eval()
    assert pooled.out_grid(features.grids) == (2, 3) and pooled.extra_tokens(features.grids) == (1, 2)
    assert pooled.num_tokens(features.grids) == 9 == pooled(features).shape[1]
    front = pooled.extra_tokens(features.grids).front
    assert torch.equal(pooled(features)[:, front : front + 6], features[-1])
    assert queries.num_tokens(features.grids) == 7 == queries(features).shape[1]
    assert [fuser.cost(features.grids).num_tokens for fuser in (pooled, queries)] == [9, 7]


@pytest.fixture(params=[False, True], ids=["cpu", "meta"])
def built_on(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with torch.device("meta" if request.param else "cpu") as device:
        yield device


@pytest.mark.usefixtures("built_on")
def test_matrix_products_are_counted_as_the_fuser_runs() -> None:
    grids = [(2, 3)] * 3
    text, queries = TextGated(8, 3), Queries(8, 3, num_queries=5)
    # The gate, and one product of 1 x L weights with L x (N C) maps.
    assert text.flops(grids) == 2 * 6 * 3 + 2 * 3 * 6 * 8
    # The projection, then queries x maps and weights x maps; whichever kernel a CPU has for attention.
    assert queries.flops(grids) == 2 * 6 * 8 * 8 + 2 * 2 * 5 * 6 * 8
    assert Pooled(8, 3).flops(grids) == 0
    assert queries.training and queries.queries.grad is None


def test_extra_flops_are_added() -> None:
    class Summed(Pooled):
        def extra_flops(self, grids: Sequence[Grid]) -> int:
            return 100 * len(grids)

    assert Summed(8, 3).flops([(2, 3)] * 3) == 300
