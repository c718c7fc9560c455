"""Dense attention in MMFuser's structure: its formula, its start, any grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import CrossAttention, create_fuser
from layerfuse.testing import random_features, randomise_parameters

grid_lists = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=5)


def _attention(layer: Any, query: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return attention head by head, the products and the softmax written out."""
    width = query.shape[-1] // layer.num_heads
    outputs = []
    for head in range(layer.num_heads):
        own = slice(head * width, (head + 1) * width)
        q, k, v = layer.q_proj(query)[..., own], layer.k_proj(values)[..., own], layer.v_proj(values)[..., own]
        weights = (q @ k.transpose(1, 2) / width**0.5).exp()
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v)
    return torch.cat(outputs, dim=-1) @ layer.o_proj.weight.T + layer.o_proj.bias


@settings(max_examples=10)
@given(grids=grid_lists, query=st.integers(-5, 4), num_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 100))
def test_parity_with_the_formula_written_out(grids: list[Grid], query: int, num_heads: int, seed: int) -> None:
    index = query % len(grids)
    fuser = randomise_parameters(CrossAttention(16, len(grids), num_heads=num_heads, query_index=index))
    features = random_features(16, grids=grids, seed=seed)
    q = features[index]
    others = torch.cat([tokens for place, tokens in enumerate(features) if place != index], dim=1)
    attended = _attention(fuser.cross_attn, fuser.query_norm(q), fuser.feat_norm(others))
    inner = fuser.norm1(attended)
    refined = attended + fuser.self_scale.scale * _attention(fuser.self_attn, inner, inner)
    torch.testing.assert_close(fuser(features), q + fuser.output_scale.scale * refined, rtol=1e-5, atol=1e-5)


def test_attention_parity_with_torchs_own_layer() -> None:
    """Equal to torch's attention layer with the same weights; its bias of the keys is zero here."""
    ours = randomise_parameters(CrossAttention(16, 2, num_heads=4)).cross_attn
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        biases = (ours.q_proj.bias, torch.zeros(16), ours.v_proj.bias)
        theirs.in_proj_bias.copy_(torch.cat(biases))
        theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    query, values = torch.randn(2, 6, 16), torch.randn(2, 10, 16)
    torch.testing.assert_close(ours(query, values), theirs(query, values, values)[0], rtol=1e-5, atol=1e-5)


@given(
    grids=grid_lists,
    query=st.integers(-5, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=10)
def test_a_new_cross_attention_is_the_identity_on_its_query(grids: list[Grid], query: int, dtype: torch.dtype) -> None:
    index = query % len(grids)
    fuser = CrossAttention(16, len(grids), num_heads=4, query_index=index).to(dtype)
    features = random_features(16, grids=grids, dtype=dtype)
    assert torch.equal(fuser(features), features[index])
    assert fuser.out_grid(features.grids) == grids[index]


def test_the_order_of_the_value_maps_does_not_matter() -> None:
    fuser = randomise_parameters(CrossAttention(16, 3, num_heads=4))
    features = random_features(16, grids=[(2, 3), (4, 4), (3, 5)])
    first, second, query = features
    turned = FeatureMaps((second, first, query), layers=(2, 1, 3), grids=((4, 4), (2, 3), (3, 5)))
    torch.testing.assert_close(fuser(turned), fuser(features))


def test_cross_attention_trains_away_from_the_identity() -> None:
    fuser = CrossAttention(16, 3, num_heads=4)
    features = random_features(16, num_layers=3)
    optimizer = torch.optim.Adam(fuser.parameters(), lr=0.03)
    losses = []
    for _ in range(20):
        loss = (fuser(features) - features[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_cross_attention_has_the_promised_size() -> None:
    with torch.device("meta"):
        fuser = create_fuser("cross_attention", in_channels=1024, num_layers=5)
    cost = fuser.cost([(24, 24)] * 5)
    channels, tokens, values = 1024, 576, 4 * 576
    projections = 2 * channels**2 * (2 * tokens + 2 * values + 4 * tokens)
    products = 4 * channels * tokens * (values + tokens)
    assert (cost.parameters, cost.out_channels, cost.num_tokens) == (8_402_944, 1024, 576)
    assert cost.flops == projections + products


def test_the_cost_grows_with_the_square_of_the_patches() -> None:
    fuser = CrossAttention(8, 2, num_heads=2)
    costs = [fuser.cost([(side, side)] * 2).flops for side in (50, 100, 200)]
    assert costs[2] - 4 * costs[1] > 15 * (costs[1] - 4 * costs[0]) > 0


def test_cross_attention_taps_mmfusers_layers() -> None:
    assert CrossAttention.default_layers(24) == (3, 8, 13, 18, 23)
    assert CrossAttention.default_layers(12) is None


@pytest.mark.parametrize(
    ("num_layers", "options", "message"),
    [
        (1, {}, "num_layers=1; it needs at least 2, .* use 'select'"),
        (3, {"query_index": -4}, "query_index -4 is outside the 3 maps; allowed: -3..2"),
        (3, {"num_heads": 5}, "16 channels cannot be split evenly over 5 heads; .* 1, 2, 4, 8, 16"),
    ],
)
def test_impossible_options_are_refused(num_layers: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossAttention(16, num_layers, **options)
