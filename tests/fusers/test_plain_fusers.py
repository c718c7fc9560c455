"""What the fusers without attention compute, against torch expressions written out."""

from __future__ import annotations

import pytest
import torch

from layerfuse.fusers import Average, Concat, ScalarMix, Select
from layerfuse.testing import random_features, randomise_parameters


def test_select_returns_the_map_itself() -> None:
    features = random_features([8, 4, 6], grids=[(2, 3), (1, 2), (3, 3)])
    for index in (-3, -1, 0, 1):
        fuser = Select(features.channels, 3, index=index)
        assert fuser(features) is features.maps[index]
        assert fuser.out_channels == features.channels[index]
        assert fuser.num_tokens(features.grids) == features.maps[index].shape[1]


@pytest.mark.parametrize("index", [3, -4])
def test_select_refuses_a_map_that_is_not_there(index: int) -> None:
    with pytest.raises(ValueError, match=f"index {index} is outside the 3 maps; allowed: -3..2"):
        Select(8, 3, index=index)


def test_average_is_the_mean() -> None:
    features = random_features(8, num_layers=4)
    torch.testing.assert_close(Average(8, 4)(features), sum(features.maps) / 4)


def test_scalar_mix_starts_as_the_average() -> None:
    features = random_features(8, num_layers=4)
    torch.testing.assert_close(ScalarMix(8, 4)(features), Average(8, 4)(features))


def test_scalar_mix_is_a_scaled_softmax_mixture() -> None:
    fuser = randomise_parameters(ScalarMix(8, 3))
    features = random_features(8, num_layers=3)
    weights = fuser.layer_logits.exp() / fuser.layer_logits.exp().sum()
    expected = fuser.scale * sum(weight * x for weight, x in zip(weights, features, strict=True))
    torch.testing.assert_close(fuser(features), expected)
    assert sum(parameter.numel() for parameter in fuser.parameters()) == 4


def test_scalar_mix_answers_in_the_dtype_of_the_maps() -> None:
    features = random_features(8, num_layers=3, dtype=torch.bfloat16)
    assert ScalarMix(8, 3)(features).dtype == torch.bfloat16


def test_concat_keeps_the_order_of_the_maps() -> None:
    features = random_features([8, 4, 6])
    fuser = Concat([8, 4, 6], 3)
    assert torch.equal(fuser(features), torch.cat(features.maps, dim=-1))
    assert fuser.out_channels == 18 and not list(fuser.parameters())


def test_concat_normalises_over_all_channels_then_projects() -> None:
    fuser = randomise_parameters(Concat(8, 3, norm="layer", out_channels=5))
    features = random_features(8, num_layers=3)
    joined = torch.cat(features.maps, dim=-1)
    normal = (joined - joined.mean(-1, keepdim=True)) / (joined.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (normal * fuser.norm.weight + fuser.norm.bias) @ fuser.proj.weight.T + fuser.proj.bias
    torch.testing.assert_close(fuser(features), expected)


def test_concat_refuses_an_unknown_norm() -> None:
    with pytest.raises(ValueError, match="norm 'batch' of fuser 'concat' is unknown. Known: layer, none"):
        Concat(8, 2, norm="batch")


def test_concat_refuses_no_channels() -> None:
    with pytest.raises(ValueError, match="out_channels is 0; expected at least 1, or None"):
        Concat(8, 2, out_channels=0)
