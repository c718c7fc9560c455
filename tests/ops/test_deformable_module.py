"""The deformable attention layer: where a new one looks, what it costs, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layerfuse.fusers import MMFuser
from layerfuse.ops import MultiScaleDeformableAttention, set_implementation
from layerfuse.testing import randomise_parameters


def test_a_new_layer_reads_k_cells_away_in_each_heads_direction() -> None:
    layer = MultiScaleDeformableAttention(8, num_heads=4, num_points=2)
    torch.nn.init.eye_(layer.value_proj.weight)
    torch.nn.init.eye_(layer.output_proj.weight)
    grid = (5, 7)
    image = torch.randn(1, 8, *grid)
    values = image.flatten(2).transpose(1, 2)
    read = layer(values, grid, values, [grid]).transpose(1, 2).unflatten(2, grid)
    directions = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # (x, y) of heads 0..3
    for head, (x, y) in enumerate(directions):
        channels = slice(2 * head, 2 * head + 2)
        expected = (image[0, channels, 2 + y, 3 + x] + image[0, channels, 2 + 2 * y, 3 + 2 * x]) / 2
        torch.testing.assert_close(read[0, channels, 2, 3], expected, atol=1e-5, rtol=0)


def test_offsets_are_counted_in_cells_of_the_level_they_read() -> None:
    layer = MultiScaleDeformableAttention(2, num_heads=1, num_levels=2, num_points=1)
    torch.nn.init.eye_(layer.value_proj.weight)
    torch.nn.init.eye_(layer.output_proj.weight)
    with torch.no_grad():
        layer.attention_weights.bias.copy_(torch.tensor([-100.0, 100.0]))
    fine, coarse = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 2, 2)
    values = torch.cat((fine.flatten(2), coarse.flatten(2)), dim=2).transpose(1, 2)
    read = layer(torch.zeros(1, 4, 2), (2, 2), values, [(4, 4), (2, 2)])
    # The ring's first point lies one cell to the right; there is none to the right of the second column.
    expected = torch.stack((coarse[0, :, 0, 1], torch.zeros(2), coarse[0, :, 1, 1], torch.zeros(2)))
    torch.testing.assert_close(read[0], expected, atol=1e-6, rtol=0)


def test_counted_projections_equal_the_flop_counter() -> None:
    layer = MultiScaleDeformableAttention(32, num_heads=4, num_levels=2, num_points=3)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 6, 32), (2, 3), torch.randn(1, 14, 32), [(2, 5), (2, 2)])
    assert counter.get_total_flops() == layer.matmul_flops(6, 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_keeps_sampling_precise(dtype: torch.dtype) -> None:
    layer = randomise_parameters(MultiScaleDeformableAttention(32, num_heads=4)).to(dtype)
    tokens = torch.randn(2, 12, 32, dtype=dtype)
    exact = layer(tokens, (3, 4), tokens, [(3, 4)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(tokens, (3, 4), tokens, [(3, 4)])
    assert (mixed - exact).abs().max() < 0.05 * exact.abs().max()


def test_heads_that_do_not_divide_the_channels_are_refused_with_those_that_do() -> None:
    with pytest.raises(
        ValueError, match="12 channels cannot be split evenly over 5 heads; .* one of 1, 2, 3, 4, 6, 12"
    ):
        MultiScaleDeformableAttention(12, num_heads=5)


@pytest.mark.parametrize("name", ["num_heads", "num_levels", "num_points"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        MultiScaleDeformableAttention(16, **{name: 0})


def test_an_unknown_implementation_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="'fast' of deformable attention is unknown"):
        MultiScaleDeformableAttention(16, implementation="fast")


def test_set_implementation_reaches_every_layer_and_no_saved_config() -> None:
    fuser = MMFuser(16, 3, num_heads=4, implementation="gather")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), fuser)
    before = fuser.config
    set_implementation(model, "reference")
    assert {fuser.cross_attn.implementation, fuser.self_attn.implementation} == {"reference"}
    assert fuser.config == before and "implementation" not in before
    with pytest.raises(ValueError, match="'fast' of deformable attention is unknown"):
        set_implementation(model, "fast")
    assert fuser.self_attn.implementation == "reference"
