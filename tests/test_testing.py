"""The tiny inputs that other tests are built on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerfuse.testing import random_features, random_images, randomise_parameters


def test_equal_seeds_give_equal_inputs() -> None:
    torch.testing.assert_close(random_images(seed=3), random_images(seed=3), rtol=0, atol=0)
    assert not torch.equal(random_images(seed=3), random_images(seed=4))
    torch.testing.assert_close(random_features(8, seed=3).maps, random_features(8, seed=3).maps, rtol=0, atol=0)


def test_features_have_what_was_asked() -> None:
    features = random_features(
        [8, 16], grids=[(1, 2), (3, 4)], num_prefix_tokens=2, dtype=torch.float64, requires_grad=True
    )
    assert features.channels == (8, 16)
    assert features.grids == ((1, 2), (3, 4))
    assert [tuple(prefix.shape) for prefix in features.prefix] == [(2, 2, 8), (2, 2, 16)]
    assert all(feature_map.requires_grad and feature_map.dtype == torch.float64 for feature_map in features)


@pytest.mark.parametrize(("arguments", "count"), [({}, 5), ({"num_layers": 2}, 2), ({"grids": [(1, 1)] * 3}, 3)])
def test_the_number_of_maps_follows_from_what_is_given(arguments: dict, count: int) -> None:
    assert len(random_features(8, **arguments)) == count


def test_numbers_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="name different numbers of maps"):
        random_features([8, 8], num_layers=3)


def test_no_parameter_keeps_a_special_start() -> None:
    layer = nn.LayerNorm(64)
    assert randomise_parameters(layer) is layer
    assert layer.bias.abs().min() > 0
    assert (layer.weight - 1).abs().min() > 0
