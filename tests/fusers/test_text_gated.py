"""TextGated: IGVA's formula with torch's own attention; groups, class tokens, and a start that no condition moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerfuse.features import FeatureMaps
from layerfuse.fusers import TextGated, create_fuser
from layerfuse.testing import random_features, randomise_parameters


def _torch_attention(layer: nn.Module) -> nn.MultiheadAttention:
    """The attention of torch with the weights of one of the gate's layers."""
    channels = layer.query.in_features
    attention = nn.MultiheadAttention(channels, layer.num_heads, batch_first=True)
    key_bias = torch.randn(channels)  # the softmax takes it out again
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        attention.in_proj_bias.copy_(torch.cat([layer.query.bias, key_bias, layer.value.bias]))
    attention.out_proj.load_state_dict(layer.out.state_dict())
    return attention


def _by_the_formula(
    fuser: TextGated, features: FeatureMaps, condition: torch.Tensor, runs: list[list[int]], summaries: list[Any]
) -> torch.Tensor:
    """IGVA's aggregator with torch's attention and the means written out.

    Args:
        runs: positions of the maps of each group.
        summaries: (B, C) per map, what the gate sees of it.
    """
    means = [sum(features[index] for index in run) / len(run) for run in runs]
    classes = torch.stack([sum(summaries[index] for index in run) / len(run) for run in runs], dim=1)
    groups = F.linear(classes, fuser.key_proj.weight, fuser.key_proj.bias)
    x = F.linear(condition, fuser.condition_proj.weight, fuser.condition_proj.bias)
    for layer in fuser.layers:
        attended, _ = _torch_attention(layer)(x[:, None], groups, groups)
        x = layer.norm1(x + attended[:, 0])
        first, _, second = layer.feed_forward
        x = layer.norm2(x + second(first(x).relu()))
    logits = F.linear(x, fuser.weight_head.weight, fuser.weight_head.bias)
    shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(fuser.group_weights(features, condition), shares, rtol=1e-5, atol=1e-5)
    mixed = sum(shares[:, k, None, None] * mean for k, mean in enumerate(means))
    return torch.cat([features[fuser.base_index], mixed], dim=-1)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
@pytest.mark.parametrize(
    ("num_layers", "options", "runs"),
    [
        (24, {}, [list(range(k, k + 6)) for k in (0, 6, 12, 18)]),
        (12, {"groups": 3, "hidden_channels": 12}, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (5, {}, [[0, 1], [2], [3], [4]]),
        (5, {"groups": [1, 3, 1], "base_index": 0}, [[0], [1, 2, 3], [4]]),
        (4, {"num_attention_layers": 1, "num_heads": 2}, [[0], [1], [2], [3]]),
        (1, {"groups": 1, "base_index": -1}, [[0]]),
    ],
)
def test_parity_with_the_formula(
    num_layers: int, options: dict[str, Any], runs: list[list[int]], num_prefix_tokens: int
) -> None:
    fuser = randomise_parameters(TextGated(8, num_layers, condition_channels=6, **options))
    features = random_features(8, num_layers=num_layers, grids=(2, 3), num_prefix_tokens=num_prefix_tokens)
    summaries = [x[:, 0] for x in features.prefix] or [x.mean(1) for x in features]
    condition = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    expected = _by_the_formula(fuser, features, condition, runs, summaries)
    torch.testing.assert_close(fuser(features, condition), expected, rtol=1e-5, atol=1e-5)


def test_parity_with_the_formula_on_mean_tokens_of_a_backbone_with_prefix_tokens() -> None:
    fuser = randomise_parameters(TextGated(8, 4, condition_channels=6, keys="mean"))
    features = random_features(8, num_layers=4, num_prefix_tokens=4)
    condition = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    expected = _by_the_formula(fuser, features, condition, [[0], [1], [2], [3]], [x.mean(1) for x in features])
    torch.testing.assert_close(fuser(features, condition), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_at_the_start_every_condition_gives_the_plain_mean_of_the_groups(scale: float) -> None:
    fuser = TextGated(8, 6, condition_channels=5, groups=3)
    features = random_features(8, num_layers=6, num_prefix_tokens=1)
    output = fuser(features, scale * torch.randn(2, 5))
    assert torch.equal(output[..., :8], features[-2])
    torch.testing.assert_close(output[..., 8:], torch.stack(features.maps).mean(0))
    assert torch.equal(output, fuser(features, torch.zeros(2, 5)))


def test_a_neutral_condition_equals_no_condition() -> None:
    fuser = randomise_parameters(TextGated(8, 4, condition_channels=5))
    blind = copy.deepcopy(fuser)
    torch.nn.init.zeros_(blind.condition_proj.weight)
    features, condition = random_features(8, num_layers=4, num_prefix_tokens=1), torch.randn(2, 5)
    neutral = fuser(features, torch.zeros(2, 5))
    assert torch.equal(neutral, blind(features, condition))
    assert not torch.allclose(neutral, fuser(features, condition), atol=1e-3)


def test_training_moves_the_weights_apart_and_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    fuser = TextGated(8, 4, condition_channels=5)
    features, condition = random_features(8, num_layers=4), torch.tensor([[1.0] * 5, [-1.0] * 5])
    wanted = torch.stack([features[0][0], features[3][1]])
    optimizer = torch.optim.Adam(fuser.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        (fuser(features, condition)[..., 8:] - wanted).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in fuser.parameters())
    assert fuser.group_weights(features, condition).argmax(-1).tolist() == [0, 3]


def test_the_layers_are_all_blocks_and_the_base_is_the_penultimate() -> None:
    layers = TextGated.default_layers(24)
    assert layers == tuple(range(1, 25))
    fuser = TextGated(8, 24, condition_channels=5)
    assert layers[fuser.base_index] == 23 and fuser.group_sizes == (6, 6, 6, 6)


def test_the_published_size_is_reached_but_for_the_key_biases() -> None:
    with torch.device("meta"):
        fuser = create_fuser("text_gated", in_channels=1024, num_layers=24, options={"condition_channels": 768})
        published = nn.ModuleList(
            nn.ModuleList([nn.MultiheadAttention(1024, 4), nn.Linear(1024, 1024), nn.Linear(1024, 1024)])
            for _ in range(4)
        )
    cost = fuser.cost([(24, 24)] * 24)
    ends = 769 * 1024 + 1025 * 1024 + 1025 * 4
    norms = 4 * 2 * 2 * 1024
    blocks = sum(parameter.numel() for parameter in published.parameters())
    assert cost.parameters == blocks + norms + ends - 4 * 1024
    assert (cost.num_tokens, cost.out_channels) == (576, 2048)


def test_the_width_of_the_condition_must_be_given() -> None:
    with pytest.raises(ValueError, match="fuser 'text_gated' needs the options condition_channels; give them"):
        create_fuser("text_gated", in_channels=8, num_layers=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": "cls"}, "keys 'cls' of fuser 'text_gated' is unknown; did you mean 'class'. Known: class, mean"),
        ({"groups": 6}, r"5 maps cannot be cut into 6 groups; allowed: 1\.\.5. Tap more layers"),
        ({"groups": 0}, r"5 maps cannot be cut into 0 groups; allowed: 1\.\.5"),
        ({"groups": [2, 2]}, r"groups \[2, 2\] hold 4 maps, the fuser has 5; give the number of maps of each"),
        ({"groups": [5, 0]}, r"groups \[5, 0\] hold 5 maps, the fuser has 5; .* at least 1"),
        ({"base_index": 5}, r"base_index 5 is outside the 5 maps; allowed: -5\.\.4"),
        ({"condition_channels": 0}, "condition_channels of fuser 'text_gated' is 0; expected at least 1"),
        ({"num_attention_layers": 0}, "num_attention_layers of fuser 'text_gated' is 0; expected at least 1"),
        ({"num_heads": 0}, "num_heads is 0; expected at least 1"),
        ({"hidden_channels": 0}, "hidden_channels of fuser 'text_gated' is 0; expected at least 1"),
        ({"num_heads": 3}, "8 channels cannot be split evenly over 3 heads; num_heads must be one of 1, 2, 4, 8"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextGated(8, 5, **{"condition_channels": 6, **options})
