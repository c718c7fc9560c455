"""Pooling by attention: against transformers' Molmo2, on any grid, with any window."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import AttentionPool, create_fuser
from layerfuse.testing import random_features, randomise_parameters

sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))


def _molmo2(name: str) -> Any:
    """Return a module of transformers' Molmo2, or skip the test."""
    try:
        return importlib.import_module(f"transformers.models.molmo2.{name}")
    except ModuleNotFoundError:
        pytest.skip("this transformers has no Molmo2Adapter (transformers.models.molmo2)")


def _molmo2_adapter(*, channels: int, num_layers: int, num_heads: int) -> Any:
    config = _molmo2("configuration_molmo2").Molmo2AdapterConfig(
        hidden_size=channels,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=channels // num_heads,
        vision_feature_layer=list(range(num_layers)),
        intermediate_size=24,
        text_hidden_size=10,
    )
    config._attn_implementation = "eager"
    return randomise_parameters(_molmo2("modeling_molmo2").Molmo2Adapter(config).eval())


def _molmo2_windows(grid: Grid, window: int, batch_size: int) -> torch.Tensor:
    """Return Molmo2's own list of the patches of each window, for the images of a batch one after another."""
    height, width = grid
    arange = _molmo2("image_processing_molmo2").arange_for_pooling
    images = []
    for image in range(batch_size):
        patches = torch.arange(height * width).view(grid) + image * height * width
        images.append(arange(patches, window, window)[0])
    return torch.cat(images)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 24])
@pytest.mark.parametrize(("grid", "window"), [((4, 6), 2), ((5, 3), 2), ((7, 4), 3), ((1, 1), 2), ((2, 9), 4)])
def test_parity_with_transformers_molmo2_adapter(num_layers: int, grid: Grid, window: int) -> None:
    """Equal through the attention and, with their projector behind ours, through the whole adapter."""
    adapter = _molmo2_adapter(channels=8, num_layers=num_layers, num_heads=2)
    fuser = AttentionPool(8, num_layers, window=window, num_heads=2)
    fuser.load_state_dict(adapter.image_pooling_2d.state_dict())
    features = random_features(8, num_layers=num_layers, grids=grid)
    pooled: list[torch.Tensor] = []
    adapter.image_pooling_2d.register_forward_hook(lambda _module, _inputs, outputs: pooled.append(outputs[0]))
    with torch.no_grad():
        theirs = adapter(torch.cat(features.maps, dim=-1), _molmo2_windows(grid, window, 2)).last_hidden_state
        ours = fuser(features)
        projected = adapter.image_projector(ours)
    torch.testing.assert_close(ours, pooled[0].view_as(ours), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projected, theirs.view_as(projected), rtol=1e-5, atol=1e-5)


def _written_out(fuser: AttentionPool, features: FeatureMaps) -> torch.Tensor:
    """Return what the formula says, window by window and head by head, over the patches that are there."""
    (height, width), window = features.grids[0], fuser.window
    cells = torch.cat(features.maps, dim=-1).unflatten(1, (height, width))
    rows, columns = fuser.out_grid(features.grids)
    above, left = (rows * window - height) // 2, (columns * window - width) // 2
    head_width = fuser.out_channels // fuser.num_heads
    tokens = []
    for row in range(rows):
        for column in range(columns):
            down, right = row * window - above, column * window - left
            patches = cells[:, max(down, 0) : down + window, max(right, 0) : right + window].flatten(1, 2)
            query = fuser.q_proj(patches.mean(1))
            key, value = fuser.k_proj(patches), fuser.v_proj(patches)
            heads = []
            for head in range(fuser.num_heads):
                own = slice(head * head_width, (head + 1) * head_width)
                weights = ((key[..., own] * query[:, None, own]).sum(-1) / head_width**0.5).softmax(-1)
                heads.append((weights[..., None] * value[..., own]).sum(1))
            tokens.append(fuser.o_proj(torch.cat(heads, dim=-1)))
    return torch.stack(tokens, dim=1)


@settings(max_examples=15)
@given(
    grid=sizes,
    window=st.integers(1, 5),
    widths=st.lists(st.sampled_from([4, 6, 8]), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)
def test_parity_with_the_formula_written_out(grid: Grid, window: int, widths: list[int], seed: int) -> None:
    options = {"window": window, "num_heads": 2, "out_channels": 12}
    fuser = randomise_parameters(AttentionPool(widths, len(widths), **options))
    features = random_features(widths, grids=[grid] * len(widths), seed=seed)
    torch.testing.assert_close(fuser(features), _written_out(fuser, features), rtol=1e-5, atol=1e-5)


@given(grid=sizes, window=st.integers(1, 5))
def test_the_grid_is_rounded_up(grid: Grid, window: int) -> None:
    fuser = AttentionPool(8, 2, window=window, num_heads=2)
    height, width = fuser.out_grid([grid, grid])
    assert (height - 1) * window < grid[0] <= height * window
    assert (width - 1) * window < grid[1] <= width * window
    assert fuser(random_features(8, num_layers=2, grids=grid)).shape == (2, height * width, 8)


def test_padding_is_never_read() -> None:
    """A patch's gradient is the same whether its window is whole or cut: values outside are no values."""
    fuser = randomise_parameters(AttentionPool(8, 2, num_heads=2)).double()
    features = random_features(8, num_layers=2, grids=(3, 3), dtype=torch.float64)
    corner = FeatureMaps(tuple(tokens[:, 8:] for tokens in features), features.layers, ((1, 1), (1, 1)))
    # Of a grid of 3x3, the last window of 2x2 holds the last patch alone.
    torch.testing.assert_close(fuser(features)[:, 3:], fuser(corner))


def test_translation_by_whole_windows_translates_the_tokens() -> None:
    fuser = randomise_parameters(AttentionPool(8, 2, num_heads=2)).double()
    features = random_features(8, num_layers=2, grids=(4, 6), dtype=torch.float64)

    def roll(tokens: torch.Tensor, grid: Grid, step: int) -> torch.Tensor:
        return tokens.unflatten(1, grid).roll(step, dims=2).flatten(1, 2)

    moved = fuser(features.map(lambda tokens: roll(tokens, (4, 6), 2)))
    torch.testing.assert_close(moved, roll(fuser(features), (2, 3), 1))


def test_a_window_of_one_patch_is_a_linear_map_of_it() -> None:
    fuser = randomise_parameters(AttentionPool(8, 3, window=1, num_heads=2))
    features = random_features(8, num_layers=3, grids=(2, 3))
    expected = fuser.o_proj(fuser.v_proj(torch.cat(features.maps, dim=-1)))
    torch.testing.assert_close(fuser(features), expected)


def test_attention_pool_has_the_promised_size() -> None:
    with torch.device("meta"):
        fuser = create_fuser("attention_pool", in_channels=1024, num_layers=2)
    cost = fuser.cost([(24, 24)] * 2)
    assert (cost.parameters, cost.out_channels, cost.num_tokens) == (7_344_128, 1024, 144)
    products = 2 * 1024 * (2048 * (144 + 2 * 576) + 1024 * 144)
    assert cost.flops == products + 2 * 2 * 1024 * 576


def test_attention_pool_taps_the_published_layers() -> None:
    """Molmo2 counts blocks from 0: 24 and 18 of 27; Molmo counts from the end of 23 blocks: -2 and -9."""
    assert AttentionPool.default_layers(27) == (25, 19)
    assert AttentionPool.default_layers(24) == (22, 15)
    assert AttentionPool.default_layers(12) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window of fuser 'attention_pool' is 0; expected at least 1"),
        ({"out_channels": 0}, "out_channels of fuser 'attention_pool' is 0; expected at least 1"),
        ({"num_heads": 3}, "8 channels cannot be split evenly over 3 heads; num_heads must be one of 1, 2, 4, 8"),
        ({"num_heads": 0}, "num_heads is 0; expected at least 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPool(8, 3, **options)
