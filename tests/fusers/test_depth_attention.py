"""Attention over depth: its formula, its two starts, and the plain fusers that it contains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import Average, DepthAttention, Select, create_fuser
from layerfuse.testing import random_features, randomise_parameters

ALL_FORMS = [(logits, start) for logits in ("query", "own") for start in ("mean", "query_layer")]
every_form = pytest.mark.parametrize(("logits", "start"), ALL_FORMS)


def _rms_norm(tokens: torch.Tensor) -> torch.Tensor:
    return tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _written_out(fuser: DepthAttention, features: FeatureMaps) -> torch.Tensor:
    """Return what the formula says, head by head and channel by channel."""
    num_heads = fuser.num_heads
    width = fuser.out_channels // num_heads
    outputs = []
    for head in range(num_heads):
        own = slice(head * width, (head + 1) * width)
        logits = []
        for layer, tokens in enumerate(features):
            if fuser.logits == "query":
                key = fuser.key_weight[layer * num_heads + head]
                logit = _rms_norm(features[fuser.query_index]) @ key
            else:
                logit = _rms_norm(tokens)[..., own] @ fuser.key_weight[own]
            logits.append(logit + fuser.key_bias[layer, head])
        weights = torch.stack(logits).exp()
        weights = weights / weights.sum(0)
        layers = zip(weights, features, fuser.value_scale, strict=True)
        outputs.append(sum(w[..., None] * x[..., own] * s[own] for w, x, s in layers))
    mixed = torch.cat(outputs, dim=-1)
    return mixed + features[fuser.query_index] if fuser.start == "query_layer" else mixed


@every_form
@settings(max_examples=10)
@given(
    num_layers=st.integers(1, 24),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_heads=st.sampled_from([1, 2, 4]),
    query=st.integers(-24, 23),
    seed=st.integers(0, 100),
)
def test_parity_with_the_formula_written_out(
    logits: str, start: str, num_layers: int, grid: Grid, num_heads: int, query: int, seed: int
) -> None:
    options = {"num_heads": num_heads, "logits": logits, "start": start, "query_index": query % num_layers}
    fuser = randomise_parameters(DepthAttention(8, num_layers, **options))
    features = random_features(8, num_layers=num_layers, grids=grid, seed=seed)
    torch.testing.assert_close(fuser(features), _written_out(fuser, features), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logits", ["query", "own"])
@given(
    num_layers=st.integers(1, 24),
    query=st.integers(-24, 23),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
@settings(max_examples=10)
def test_started_at_the_query_layer_it_is_the_identity_to_the_bit(
    logits: str, num_layers: int, query: int, dtype: torch.dtype
) -> None:
    index = query % num_layers
    fuser = DepthAttention(8, num_layers, num_heads=2, logits=logits, start="query_layer", query_index=index).to(dtype)
    features = random_features(8, num_layers=num_layers, dtype=dtype)
    assert torch.equal(fuser(features), Select(8, num_layers, index=index)(features))


@pytest.mark.parametrize("logits", ["query", "own"])
@pytest.mark.parametrize("num_layers", [1, 3, 24])
def test_with_zero_logits_it_is_the_average(logits: str, num_layers: int) -> None:
    fuser = DepthAttention(8, num_layers, num_heads=2, logits=logits)
    features = random_features(8, num_layers=num_layers)
    torch.testing.assert_close(fuser(features), Average(8, num_layers)(features), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logits", ["query", "own"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_with_one_layer_far_above_the_others_it_is_select(logits: str, layer: int) -> None:
    fuser = DepthAttention(8, 3, num_heads=2, logits=logits)
    with torch.no_grad():
        fuser.key_bias[layer] = 1e4
    features = random_features(8, num_layers=3)
    assert torch.equal(fuser(features), Select(8, 3, index=layer)(features))


@every_form
def test_every_layer_learns_from_the_first_step_on(logits: str, start: str) -> None:
    fuser = DepthAttention(8, 4, num_heads=2, logits=logits, start=start)
    fuser(random_features(8, num_layers=4)).square().sum().backward()
    assert (fuser.value_scale.grad.abs() > 0).all()
    if start == "mean":
        assert fuser.key_weight.grad.abs().sum() > 0
        assert (fuser.key_bias.grad.abs() > 0).all()


@every_form
def test_layer_weights_are_one_picture_per_head_and_layer(logits: str, start: str) -> None:
    fuser = randomise_parameters(DepthAttention(8, 5, num_heads=2, logits=logits, start=start))
    features = random_features(8, num_layers=5, grids=(2, 3), dtype=torch.bfloat16)
    weights = fuser.layer_weights(features)
    assert weights.shape == (2, 2, 5, 2, 3) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 2, 2, 3))


@pytest.mark.parametrize("logits", ["query", "own"])
def test_layer_weights_are_those_that_the_output_is_summed_with(logits: str) -> None:
    fuser = randomise_parameters(DepthAttention(8, 5, num_heads=2, logits=logits))
    features = random_features(8, num_layers=5, grids=(2, 3))
    maps = torch.stack([features.nchw(layer) for layer in range(5)], dim=1)  # (B, L, C, H, W)
    scaled = (maps * fuser.value_scale[:, :, None, None]).unflatten(2, (2, 4))
    summed = torch.einsum("bmlhw,blmdhw->bmdhw", fuser.layer_weights(features), scaled)
    torch.testing.assert_close(fuser(features), summed.flatten(1, 2).flatten(2).transpose(1, 2))


def test_the_query_decides_where_its_logits_come_from_it() -> None:
    fuser = randomise_parameters(DepthAttention(8, 3, num_heads=2, query_index=1))
    features, other = random_features(8, num_layers=3), random_features(8, num_layers=3, seed=1)
    mixed = FeatureMaps((other[0], features[1], other[2]), features.layers, features.grids)
    torch.testing.assert_close(fuser.layer_weights(mixed), fuser.layer_weights(features), rtol=0, atol=0)


def test_loud_layers_do_not_win_by_their_size() -> None:
    for logits in ("query", "own"):
        fuser = randomise_parameters(DepthAttention(8, 3, num_heads=2, logits=logits))
        features = random_features(8, num_layers=3)
        louder = features.map(lambda tokens: 100 * tokens)
        torch.testing.assert_close(fuser.layer_weights(louder), fuser.layer_weights(features), rtol=1e-3, atol=1e-4)


def test_nothing_as_large_as_a_map_is_kept_for_the_backward_pass_of_frozen_maps() -> None:
    fuser = randomise_parameters(DepthAttention(64, 5, num_heads=2))
    features = random_features(64, num_layers=5, grids=(6, 6))
    given_maps = {tokens.untyped_storage().data_ptr() for tokens in features}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given_maps:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fuser(features)
    assert kept and max(tensor.numel() for tensor in kept) < features[0].numel()


def test_depth_attention_has_the_promised_size() -> None:
    sizes = {"query": (87_120, 100_270_080), "own": (6_224, 11_796_480)}
    for logits, (parameters, flops) in sizes.items():
        with torch.device("meta"):
            fuser = create_fuser("depth_attention", in_channels=1024, num_layers=5, options={"logits": logits})
        cost = fuser.cost([(24, 24)] * 5)
        assert (cost.parameters, cost.flops, cost.out_channels, cost.num_tokens) == (parameters, flops, 1024, 576)


def test_depth_attention_taps_mmfusers_layers() -> None:
    assert DepthAttention.default_layers(24) == (3, 8, 13, 18, 23)
    assert DepthAttention.default_layers(12) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": "deep"}, "logits 'deep' of fuser 'depth_attention' is unknown.* Known: own, query"),
        ({"start": "query"}, "start 'query' of fuser 'depth_attention' is unknown.* Known: mean, query_layer"),
        ({"query_index": 3}, "query_index 3 is outside the 3 maps; allowed: -3..2"),
        ({"num_heads": 3}, "8 channels cannot be split evenly over 3 heads; num_heads must be one of 1, 2, 4, 8"),
        ({"num_heads": 0}, "num_heads is 0; expected at least 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthAttention(8, 3, **options)


def test_layer_weights_of_other_maps_are_refused() -> None:
    fuser = DepthAttention(8, 3, num_heads=2)
    with pytest.raises(ValueError, match="'depth_attention' got 4 maps; it was built for num_layers=3"):
        fuser.layer_weights(random_features(8, num_layers=4))
    with pytest.raises(ValueError, match="'depth_attention' got maps of widths 4, 4, 4; it was built for 8, 8, 8"):
        fuser.layer_weights(random_features(4, num_layers=3))


@every_form
def test_maps_of_zeros_have_finite_gradients(logits: str, start: str) -> None:
    fuser = randomise_parameters(DepthAttention(8, 3, num_heads=2, logits=logits, start=start))
    zeros = random_features(8, num_layers=3).map(lambda tokens: torch.zeros_like(tokens).requires_grad_())
    fuser(zeros).sum().backward()
    gradients = [tensor.grad for tensor in (*zeros.maps, *fuser.parameters())]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
