from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from layerfuse.analysis import REDUCTIONS, colorize, fusion_maps, png_bytes, reduce_map
from layerfuse.testing import random_features


def test_norm_and_mean_keep_the_grid() -> None:
    tokens = torch.randn(2, 6, 5)
    assert_close(reduce_map(tokens, (2, 3), reduction="norm"), tokens.norm(dim=-1).reshape(2, 2, 3))
    assert_close(reduce_map(tokens, (2, 3), reduction="mean"), tokens.mean(-1).reshape(2, 2, 3))


def test_component_recovers_the_one_direction_that_varies() -> None:
    pattern = torch.tensor([0.0, 1, 2, 3, 4, 11])
    tokens = 3 + pattern[:, None] * torch.randn(8)
    expected = (pattern - pattern.mean()) / pattern.std(unbiased=False)
    assert_close(reduce_map(tokens[None], (2, 3))[0].flatten(), expected, atol=1e-4, rtol=1e-4)


def test_component_of_a_constant_map_is_zero() -> None:
    assert_close(reduce_map(torch.ones(1, 6, 4), (3, 2)), torch.zeros(1, 3, 2))


def test_figure_five_has_average_query_and_output() -> None:
    features = random_features(8, num_layers=3, grids=(2, 3))
    maps = fusion_maps(features, features.maps[1], query=1, reduction="mean")
    assert list(maps) == ["key/value average", "query", "output"]
    assert_close(maps["query"], maps["output"])
    average = (features.maps[0] + features.maps[2]) / 2
    assert_close(maps["key/value average"], reduce_map(average, (2, 3), reduction="mean"))


def test_single_layer_has_no_key_value_average() -> None:
    features = random_features(8, num_layers=1, grids=(2, 2))
    assert list(fusion_maps(features, features.maps[0])) == ["query", "output"]


def test_maps_share_one_colour_scale() -> None:
    low, high = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    high[0, 0] = 1.0
    first, second = colorize({"low": low, "high": high}, size=6, colormap="gray")
    assert first.shape == (4, 6, 3)
    assert first.max() == 0
    np.testing.assert_array_equal(second[:2, :2], np.full((2, 2, 3), 128, dtype=np.uint8))
    np.testing.assert_array_equal(second[:2, 2:], np.full((2, 4, 3), 255, dtype=np.uint8))


def test_constant_maps_are_coloured_without_dividing_by_zero() -> None:
    (picture,) = colorize([torch.ones(2, 2)], size=2, colormap="gray")
    assert picture.max() == 0


def test_png_round_trip() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(picture)))), picture)


def test_grid_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"does not fit the grid 2x2; expected \(B, 4, C\)"):
        reduce_map(torch.zeros(1, 6, 4), (2, 2))


def test_unknown_reduction_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"reduction 'max' is unknown; known: {', '.join(REDUCTIONS)}"):
        reduce_map(torch.zeros(1, 4, 4), (2, 2), reduction="max")


def test_maps_of_other_widths_are_an_error() -> None:
    features = random_features((4, 8), grids=(2, 2))
    with pytest.raises(ValueError, match=r"widths \(4, 8\); averaging key/value layers needs one grid and one width"):
        fusion_maps(features, features.maps[1])


def test_no_maps_and_unknown_colour_map_are_errors() -> None:
    with pytest.raises(ValueError, match="colorize got no maps"):
        colorize([])
    with pytest.raises(ValueError, match="colour map 'virids' is unknown"):
        colorize([torch.zeros(2, 2)], colormap="virids")


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"layerfuse\[viz\]"):
        colorize([torch.zeros(2, 2)])
