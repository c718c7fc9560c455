"""SpatialAggregator: Cambrian's formula written out in loops; windows, grids and widths; attention over depth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import SpatialAggregator, create_fuser
from layerfuse.testing import random_features, randomise_parameters


def _window(tokens: torch.Tensor, grid: Grid, out: Grid, cell: Grid) -> torch.Tensor:
    """The tokens of one image that lie below a cell of the output grid, row by row."""
    height, width = grid[0] // out[0], grid[1] // out[1]
    rows = range(cell[0] * height, (cell[0] + 1) * height)
    columns = range(cell[1] * width, (cell[1] + 1) * width)
    return torch.stack([tokens[row * grid[1] + column] for row in rows for column in columns])


def _attend(attention: nn.Module, query: torch.Tensor, windows: list[torch.Tensor]) -> torch.Tensor:
    """One query over the tokens of several windows, head by head."""
    weights = dict(attention.named_parameters())

    def project(name: str, tokens: torch.Tensor) -> torch.Tensor:
        normal = F.layer_norm(tokens, tokens.shape[-1:], weights[f"{name}.0.weight"], weights[f"{name}.0.bias"])
        return normal @ weights[f"{name}.1.weight"].T

    asked = project("query", query)
    keys = torch.cat([project(f"keys.{index}", window) for index, window in enumerate(windows)])
    values = torch.cat([project(f"values.{index}", window) for index, window in enumerate(windows)])
    size = len(asked) // attention.num_heads
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * size, (head + 1) * size)
        logits = torch.stack([asked[part] @ key[part] / math.sqrt(size) for key in keys])
        shares = logits.exp() / logits.exp().sum()
        heads.append(sum(share * value[part] for share, value in zip(shares, values, strict=True)))
    return torch.cat(heads) @ weights["out.weight"].T


def _mlp(module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    first, second = [parameter for _, parameter in module.named_parameters()]
    return F.gelu(tokens @ first.T) @ second.T


def _read(layer: nn.Module, inner: torch.Tensor, seen: torch.Tensor, windows: list[torch.Tensor]) -> torch.Tensor:
    reading = layer.reading
    if not hasattr(reading, "readers"):
        return _attend(reading, inner, windows)
    readings = [
        _attend(reader, inner, [window]) if len(window) > 1 else _mlp(reader, window[0])
        for reader, window in zip(reading.readers, windows, strict=True)
    ]
    if len(readings) == 1:
        return readings[0]
    gates = _mlp(reading.gate, seen).exp()
    return sum(gate * one for gate, one in zip(gates / gates.sum(), readings, strict=True))


def _by_the_formula(fuser: SpatialAggregator, features: FeatureMaps, out: Grid) -> torch.Tensor:
    """Cambrian's aggregator, image by image and cell by cell."""
    images = []
    for image in range(features.batch_size):
        maps = [project(x[image]) for project, x in zip(fuser.projections, features, strict=True)]
        cells = []
        for cell in ((row, column) for row in range(out[0]) for column in range(out[1])):
            query = fuser.query.table[0]
            for layer in fuser.layers:
                seen = query
                if layer.context_proj is not None:
                    mean = maps[fuser.context_index].mean(0)
                    seen = torch.cat([query, mean @ layer.context_proj.weight.T])
                inner = seen @ layer.in_proj.weight.T
                windows = [_window(x, grid, out, cell) for x, grid in zip(maps, features.grids, strict=True)]
                windows = [
                    window + positions.table if len(window) > 1 else window
                    for window, positions in zip(windows, layer.positions, strict=True)
                ]
                summed = inner + _read(layer, inner, seen, windows)
                normal = F.layer_norm(summed, summed.shape, layer.norm.weight, layer.norm.bias)
                query = query + _mlp(layer.out_mlp, normal)
            cells.append(query)
        images.append(torch.stack(cells))
    return torch.stack(images)


@pytest.mark.parametrize("mixing", ["joint", "separate"])
@pytest.mark.parametrize(
    ("widths", "grids", "options"),
    [
        ([8, 8, 8], [(2, 3)] * 3, {}),
        ([8, 6, 4], [(2, 3), (4, 6), (6, 9)], {"windows": [1, 2, 3], "grid": [2, 3], "hidden_channels": 12}),
        ([8, 8], [(4, 2), (2, 1)], {"windows": [2, 1], "context_index": -1, "depth": 1}),
        ([8], [(2, 2)], {"windows": 2, "context": "none", "depth": 2}),
        ([8], [(1, 1)], {}),
        ([8] * 24, [(1, 2)] * 24, {"depth": 1}),
    ],
    ids=["one grid", "three backbones", "last map as context", "one map in windows", "one cell", "24 layers"],
)
def test_parity_with_the_formula_in_loops(
    widths: list[int], grids: list[Grid], options: dict[str, Any], mixing: str
) -> None:
    fuser = SpatialAggregator(widths, len(widths), num_heads=2, mixing=mixing, **options)
    randomise_parameters(fuser)
    features = random_features(widths, grids=grids)
    expected = _by_the_formula(fuser, features, fuser.out_grid(features.grids))
    torch.testing.assert_close(fuser(features), expected, rtol=1e-5, atol=1e-5)


def test_parity_with_torch_attention_over_the_depth_of_a_cell() -> None:
    fuser = randomise_parameters(SpatialAggregator(8, 4, num_heads=2, depth=1, context="none"))
    features, layer = random_features(8, num_layers=4, grids=(3, 2)), fuser.layers[0]
    maps = torch.stack([project(x) for project, x in zip(fuser.projections, features, strict=True)], dim=2)

    def heads(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (2, 4)).transpose(-2, -3)

    inner = layer.in_proj(fuser.query.table).expand(2, 6, 1, 8)
    keys, values = (
        torch.stack([project(maps[:, :, index]) for index, project in enumerate(projections)], dim=2)
        for projections in (layer.reading.keys, layer.reading.values)
    )
    attended = F.scaled_dot_product_attention(heads(layer.reading.query(inner)), heads(keys), heads(values))
    attended = layer.reading.out(attended.transpose(-2, -3).flatten(-2))
    expected = (fuser.query.table + layer.out_mlp(layer.norm(inner + attended))).squeeze(2)
    torch.testing.assert_close(fuser(features), expected, rtol=1e-5, atol=1e-5)


def test_maps_of_other_grids_are_resampled_bilinearly() -> None:
    fuser = randomise_parameters(SpatialAggregator(8, 2, grid=[2, 3], windows=[1, 2], num_heads=2))
    features = random_features(8, grids=[(5, 4), (3, 3)])
    resampled = [
        F.interpolate(features.nchw(index), size=size, mode="bilinear").flatten(2).transpose(1, 2)
        for index, size in enumerate([(2, 3), (4, 6)])
    ]
    fitting = FeatureMaps(tuple(resampled), layers=(1, 2), grids=((2, 3), (4, 6)))
    torch.testing.assert_close(fuser(features), fuser(fitting))
    grown = fuser.cost(features.grids).flops - fuser.cost(fitting.grids).flops
    assert grown == 8 * 8 * (2 * 3 + 4 * 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_maps_are_resampled_in_float32_as_cambrian_does(dtype: torch.dtype) -> None:
    fuser = SpatialAggregator(8, 1, grid=[7, 9], num_heads=2).to(dtype)
    features, read = random_features(8, num_layers=1, grids=(5, 4), dtype=dtype), []
    fuser.projections[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    fuser(features)
    expected = F.interpolate(features.nchw(0).float(), size=(7, 9), mode="bilinear", align_corners=False).to(dtype)
    assert torch.equal(read[0], expected.flatten(2).transpose(1, 2))


def test_the_output_grid_is_the_last_maps_over_its_window() -> None:
    fuser = SpatialAggregator(8, 2, windows=[1, 2], num_heads=2)
    assert fuser.out_grid([(4, 4), (8, 6)]) == (4, 3)
    assert fuser.out_grid([(4, 4), (5, 1)]) == (2, 1)
    assert SpatialAggregator(8, 2, grid=[2, 5], num_heads=2).out_grid([(4, 4)] * 2) == (2, 5)


def test_a_cell_reads_its_window_alone_when_there_is_no_context() -> None:
    fuser = randomise_parameters(SpatialAggregator(8, 2, windows=2, num_heads=2, context="none"))
    features = random_features(8, num_layers=2, grids=(4, 6), requires_grad=True)
    output = fuser(features)
    output[:, 4].sum().backward()  # the cell in the second row and column of a 2x3 grid
    read = features.maps[0].grad[0].abs().sum(-1).view(4, 6).nonzero().tolist()
    assert read == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_the_published_size_is_reached_with_the_published_settings() -> None:
    with torch.device("meta"):
        fuser = create_fuser("spatial_aggregator", in_channels=1024, num_layers=5)
    cost = fuser.cost([(24, 24)] * 5)
    square = 1024 * 1024
    norms = 2 * 1024
    projections = 5 * (2 * square + 2 * 1024 + norms)
    layer = square + 2 * square + 12 * square + 11 * norms + norms + 2 * square
    assert cost.parameters == projections + 1024 + 3 * layer
    assert (cost.num_tokens, cost.out_channels) == (576, 1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "max"}, "context 'max' of fuser 'spatial_aggregator' is unknown. Known: mean, none"),
        ({"mixing": "sep"}, "mixing 'sep' of fuser 'spatial_aggregator' is unknown. Known: joint, separate"),
        ({"depth": 0}, "depth of fuser 'spatial_aggregator' is 0; expected at least 1"),
        ({"num_heads": 0}, "num_heads is 0; expected at least 1"),
        ({"hidden_channels": 0}, "hidden_channels of fuser 'spatial_aggregator' is 0; expected at least 1"),
        ({"num_heads": 3}, "8 channels cannot be split evenly over 3 heads; num_heads must be one of 1, 2, 4, 8"),
        ({"context_index": 2}, r"context_index 2 is outside the 2 maps; allowed: -2\.\.1"),
        ({"windows": [1, 2, 1]}, r"windows is \[1, 2, 1\] for 2 maps; give one edge of at least 1"),
        ({"windows": 0}, "windows is 0 for 2 maps; give one edge of at least 1"),
        ({"grid": [4]}, r"grid of fuser 'spatial_aggregator' is \[4\]; give \(H, W\) in patches"),
        ({"grid": [4, 0]}, r"grid of fuser 'spatial_aggregator' is \[4, 0\]; give \(H, W\) in patches"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpatialAggregator(8, 2, **{"num_heads": 2, **options})
