"""Contributions of layers: fusers of which the truth is known, parts of batches, and what fusers say of themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from layerfuse.analysis import LayerContributions, WeighsLayers, layer_contributions, mean_features
from layerfuse.features import FeatureMaps
from layerfuse.fusers import Fuser, create_fuser, list_fusers
from layerfuse.testing import random_features


def _features(count: int = 3, *, grid: tuple[int, int] = (3, 4), images: int = 2, channels: int = 8) -> FeatureMaps:
    return random_features(channels, num_layers=count, grids=grid, batch_size=images, num_prefix_tokens=1)


def _fuser(name: str, count: int = 3, channels: int = 8, **options: Any) -> Fuser:
    return create_fuser(name, in_channels=channels, num_layers=count, options=options).eval()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_fuser_that_reads_one_layer_has_all_of_it(index: int) -> None:
    found = layer_contributions(_fuser("select", index=index), _features())
    assert_close(found.moved, torch.eye(3, dtype=torch.float64)[index])
    assert_close(found.own_shares, torch.eye(3, dtype=torch.float64)[index])
    assert found.moved_maps is not None
    assert (found.moved_maps[:, index] > 0).all()
    assert (found.moved_maps[:, [other for other in range(3) if other != index]] == 0).all()
    assert_close(found.moved_maps[:, index].square().mean(), torch.tensor(1.0, dtype=torch.float64))


def test_equal_layers_have_equal_shares_of_an_average() -> None:
    features = _features()
    same = FeatureMaps((features[0],) * 3, features.layers, features.grids)
    found = layer_contributions(_fuser("average"), same)
    assert_close(found.moved, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert_close(found.own_shares, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_layer_counts_by_weight_times_spread() -> None:
    features = _features(images=64)
    fuser = _fuser("scalar_mix", normalise="none")
    with torch.no_grad():
        fuser.layer_factors.copy_(torch.tensor([0.6, -0.8, 0.0]))  # type: ignore[operator]
    found = layer_contributions(fuser, features)
    assert_close(found.moved, torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64), atol=0.03, rtol=0)
    assert_close(found.own_shares, torch.tensor([3 / 7, 4 / 7, 0.0], dtype=torch.float64))


def test_a_layer_that_differs_in_one_place_counts_there() -> None:
    features = _features(2)
    flat = torch.zeros_like(features[1])
    flat[0, 5] = 1.0
    found = layer_contributions(_fuser("average", 2), FeatureMaps((features[0], flat), (1, 2), features.grids))
    maps = found.moved_maps
    assert maps is not None
    assert maps[0, 1].flatten().argmax() == 5 and maps[0, 1, 1, 1] > 5 * maps[1, 1].max()


def test_zeros_may_stand_for_a_layer_in_place_of_its_mean() -> None:
    features = _features()
    shifted = features.map(lambda tokens: tokens + 100)
    zeros = mean_features([features]).map(torch.zeros_like)
    mean, zero = (layer_contributions(_fuser("average"), shifted, reference=away).moved for away in (None, zeros))
    assert_close(zero, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.01, rtol=0)
    assert (mean - 3**-0.5).abs().max() < 0.15  # independent noise of one size


def test_batches_joined_are_the_whole() -> None:
    features, fuser = _features(images=5), _fuser("depth_attention", num_heads=2)
    parts = [features.map(lambda tokens, at=at: tokens[at]) for at in (slice(0, 2), slice(2, 5))]  # type: ignore[misc]
    away = mean_features(parts)
    assert_close(away.maps[1][0, 0], features[1].mean((0, 1)))
    assert_close(away.prefix[0][0], features.prefix[0].mean(0))
    joined = LayerContributions.cat([layer_contributions(fuser, part, reference=away) for part in parts])
    whole = layer_contributions(fuser, features)
    assert_close(joined.moved, whole.moved)
    assert_close(joined.moved_maps, whole.moved_maps)
    assert_close(joined.own_shares, whole.own_shares)


@pytest.mark.parametrize("name", list_fusers())
def test_contributions_of_every_fuser_are_finite_and_what_it_says_of_itself_sums_to_one(name: str) -> None:
    torch.manual_seed(0)
    heads = ("attention_pool", "cross_attention", "depth_attention", "mmfuser", "spatial_aggregator")
    options: dict[str, Any] = {"num_heads": 2} if name in heads else {}
    if name == "text_gated":
        options["condition_channels"] = 5
    features, fuser = _features(4), create_fuser(name, in_channels=8, num_layers=4, options=options).eval()
    with torch.no_grad():
        for weight in fuser.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    condition = torch.randn(2, 5) if fuser.condition_channels else None
    found = layer_contributions(fuser, features, condition=condition)
    assert found.moved.shape == (4,) and found.moved.isfinite().all() and found.moved.max() > 0
    if isinstance(fuser, WeighsLayers) and name != "concat":
        assert found.own is not None and (found.own >= 0).all()
        assert_close(found.own.sum(1), torch.ones_like(found.own.sum(1)))
        assert found.own_shares is not None and found.own_shares.shape == (4,)
    if found.own is not None and found.own.ndim == 4:
        assert found.own.shape[2:] == fuser.out_grid(features.grids)


def test_a_new_mmfuser_is_its_query_and_a_scale_brings_the_others_in() -> None:
    features, fuser = _features(), _fuser("mmfuser", num_heads=2, query_index=1)
    found = layer_contributions(fuser, features)
    assert_close(found.moved, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    assert_close(found.own_shares, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    with torch.no_grad():
        fuser.output_scale.scale.fill_(0.5)  # type: ignore[union-attr, operator]
    found = layer_contributions(fuser, features)
    assert found.own_shares is not None
    assert_close(found.own_shares[1], torch.tensor(2 / 3, dtype=torch.float64))
    assert (found.moved[[0, 2]] > 0.01).all()


def test_depth_attention_says_the_layer_that_its_bias_prefers() -> None:
    fuser = _fuser("depth_attention", num_heads=2)
    with torch.no_grad():
        fuser.key_bias[2] = 100.0  # type: ignore[index]
    found = layer_contributions(fuser, _features())
    assert_close(found.own_shares, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert_close(found.moved, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("order", ["blocks", "interleaved"])
def test_concat_says_the_norm_of_each_layers_columns(order: str) -> None:
    fuser = _fuser("concat", out_channels=6, order=order)
    columns = torch.arange(24) % 3 if order == "interleaved" else torch.arange(24) // 8
    with torch.no_grad():
        fuser.proj.weight.copy_(torch.tensor([1.0, 3.0, 0.0])[columns].expand(6, -1))  # type: ignore[union-attr, operator]
    found = layer_contributions(fuser, _features())
    assert_close(found.own_shares, torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64))
    assert found.moved[2] == 0 < found.moved[0] < found.moved[1]
    assert layer_contributions(_fuser("concat"), _features()).own is None


def test_maps_of_other_grids_are_drawn_on_that_of_the_fused_tokens() -> None:
    features = random_features(8, grids=[(4, 6), (2, 3)])
    found = layer_contributions(_fuser("mmfuser", 2, num_heads=2), features)
    assert found.cells is not None and found.cells.shape == (2, 2, 2, 3)
    assert found.own is not None and found.own.shape == (2, 2, 2, 3)


def test_a_reference_of_other_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the reference has grids .* 2 images.*give maps of the same kind"):
        layer_contributions(_fuser("average"), _features(), reference=_features())
