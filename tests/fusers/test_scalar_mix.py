"""scalar_mix without softmax, and what it kept of version 0.1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerfuse.fusers import Average, ScalarMix, Select, fuser_from_config
from layerfuse.testing import random_features, randomise_parameters


def test_parity_with_denseformers_depth_weighted_average() -> None:
    fuser = randomise_parameters(ScalarMix(8, 4, normalise="none"))
    features = random_features(8, num_layers=4, grids=(2, 3))
    expected = torch.tensordot(fuser.layer_weights, torch.stack(features.maps), dims=1)
    torch.testing.assert_close(fuser(features), expected, atol=1e-6, rtol=1e-6)
    assert [name for name, _ in fuser.named_parameters()] == ["layer_factors"]
    assert sum(parameter.numel() for parameter in fuser.parameters()) == 4


@pytest.mark.parametrize("num_layers", [1, 2, 5, 24])
def test_without_softmax_it_starts_at_the_query_layer_or_the_mean(num_layers: int) -> None:
    for grid in ((1, 1), (2, 5)):
        features = random_features(8, num_layers=num_layers, grids=grid)
        for index in (-1, 0):
            fuser = ScalarMix(8, num_layers, normalise="none", start="query_layer", query_index=index)
            assert torch.equal(fuser(features), features[index])
        torch.testing.assert_close(
            ScalarMix(8, num_layers, normalise="none")(features), Average(8, num_layers)(features)
        )


def test_every_layer_learns_from_the_start() -> None:
    fuser = ScalarMix(8, 3, normalise="none", start="query_layer")
    fuser(random_features(8, num_layers=3)).square().sum().backward()
    assert fuser.layer_factors.grad is not None and fuser.layer_factors.grad.abs().min() > 0


@pytest.mark.parametrize("normalise", ["softmax", "none"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_hot_weights_are_select(normalise: str, index: int) -> None:
    fuser = ScalarMix(8, 3, normalise=normalise)
    one_hot = torch.nn.functional.one_hot(torch.tensor(index), 3).float()
    with torch.no_grad():
        if normalise == "softmax":
            fuser.layer_logits.copy_(one_hot.log())
        else:
            fuser.layer_factors.copy_(one_hot)
    features = random_features(8, num_layers=3, grids=(2, 3))
    assert torch.equal(fuser(features), Select(8, 3, index=index)(features))


def test_a_config_and_weights_of_layerfuse_0_1_compute_the_same() -> None:
    fuser = fuser_from_config({"name": "scalar_mix", "in_channels": 8, "num_layers": 3})
    logits, scale = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.5])
    fuser.load_state_dict({"layer_logits": logits, "scale": scale})
    features = random_features(8, num_layers=3)
    expected = scale * torch.einsum("l,lbnc->bnc", logits.softmax(0), torch.stack(features.maps))
    torch.testing.assert_close(fuser(features), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "sum"}, "normalise 'sum' of fuser 'scalar_mix' is unknown. Known: none, softmax"),
        ({"start": "last"}, "start 'last' of fuser 'scalar_mix' is unknown. Known: mean, query_layer"),
        ({"start": "query_layer"}, "cannot start at the query layer with normalise='softmax', .* normalise='none'"),
        ({"query_index": 3}, "query_index 3 is outside the 3 maps; allowed: -3..2"),
    ],
    ids=str,
)
def test_scalar_mix_refuses_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalarMix(8, 3, **options)
