"""Layers as shares of the depth, and spread evenly over it."""

from __future__ import annotations

import pickle
from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerfuse import create_backbone, resolve_layers, spread, tap
from layerfuse.testing import TinyViT, random_images


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ((0.25, 0.5, 0.75, -2), 12, (3, 6, 9, 11)),
        ((1, 1.0), 24, (1, 24)),  # layer 1, and the whole depth
        ((0.01, 0), 24, (1, 0)),  # at least layer 1
        (0.5, 13, (7,)),  # half up
        ((0.29, 0.31), 50, (15, 16)),  # 14.5 and 15.5, which binary floats have below and at the half
        ((1 / 6,), 9, (2,)),  # 1.5
        ((np.float32(0.3), torch.tensor(0.7)), 5, (2, 4)),  # 1.5 and 3.5
        (np.array([0.5, 0.25]), 24, (12, 6)),
        (torch.tensor([0.5, 1.0], dtype=torch.float64), 27, (14, 27)),
    ],
)
def test_a_float_is_a_share_of_the_depth_rounded_half_up(layers, depth: int, expected: tuple[int, ...]) -> None:
    assert resolve_layers(layers, depth) == expected


@given(depth=st.integers(1, 64), percent=st.integers(1, 100))
def test_a_share_written_in_percent_is_rounded_as_on_paper(depth: int, percent: int) -> None:
    on_paper = floor(Fraction(percent, 100) * depth + Fraction(1, 2))
    assert resolve_layers(percent / 100, depth) == (max(1, on_paper),)


@pytest.mark.parametrize("share", [0.0, 1.01, -0.5, 3.0, float("nan"), float("inf"), np.float64(2)])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"layer .* is written as a share of the depth, which lies in \(0, 1\]; write"):
        resolve_layers((1, share), 24)


def test_a_layer_named_twice_after_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"more than once \(0.5 and 6; 12 blocks\)"):
        resolve_layers((0.5, 6), 12)
    with pytest.raises(ValueError, match=r"more than once \(0.5 and 0.52; 12 blocks\)"):
        resolve_layers((0.5, 0.52), 12)
    with pytest.raises(ValueError, match=r"more than once \(1.0 and -1; 12 blocks\)"):
        resolve_layers((1.0, -1), 12)


@pytest.mark.parametrize(
    ("num_layers", "depth", "expected"),
    [(1, 24, (23,)), (4, 12, (3, 6, 8, 11)), (5, 24, (5, 9, 14, 18, 23)), (11, 12, tuple(range(1, 12)))],
)
def test_spread_lies_evenly_and_ends_at_the_penultimate_block(
    num_layers: int, depth: int, expected: tuple[int, ...]
) -> None:
    assert resolve_layers(spread(num_layers), depth) == expected


@given(data=st.data(), depth=st.integers(2, 64))
def test_spread_steps_differ_by_one_at_most(data: st.DataObject, depth: int) -> None:
    num_layers = data.draw(st.integers(1, depth - 1))
    layers = (0, *resolve_layers(spread(num_layers), depth))
    steps = [after - before for before, after in pairwise(layers)]
    assert len(steps) == num_layers
    assert layers[-1] == depth - 1
    assert 1 <= min(steps) <= max(steps) <= min(steps) + 1


def test_spread_over_too_few_blocks_says_how_many_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"spread\(12\) needs 12 layers up to the penultimate block.* 12 blocks have 11"
    ):
        resolve_layers(spread(12), 12)
    with pytest.raises(ValueError, match=r"spread\(0\) names no layer; give at least 1"):
        spread(0)


def test_spread_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(spread(3)))(13) == spread(3)(13) == (4, 8, 12)


def test_everything_that_taps_takes_shares_and_spread() -> None:
    backbone = create_backbone(
        "timm:vit_tiny_patch16_224", layers=spread(2), pretrained=False, options={"depth": 5, "embed_dim": 6}
    )
    assert backbone.layers == (2, 4)
    with torch.no_grad(), tap(model := TinyViT(depth=4).eval(), layers=(0.5, -1)) as tapped:
        model(random_images())
    assert tapped.layers == (2, 4)
