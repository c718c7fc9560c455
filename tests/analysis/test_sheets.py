from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from layerfuse.analysis import map_sheet, point_sheet, rgb_map
from layerfuse.fusers import create_fuser
from layerfuse.testing import random_features

PICTURE = np.zeros((32, 48, 3), np.uint8)


def test_cells_with_like_tokens_have_like_colours() -> None:
    kinds = torch.randn(3, 8)
    tokens = kinds[torch.tensor([0, 0, 1, 1, 2, 2])][None] + 0.001 * torch.randn(1, 6, 8)
    colours = rgb_map(tokens, (2, 3))
    assert colours.shape == (1, 2, 3, 3)
    assert colours.min() >= 0 and colours.max() <= 1
    flat = colours[0].flatten(0, 1)
    # The third component of three kinds is noise; the first two tell them apart.
    assert_close(flat[0, :2], flat[1, :2], atol=0.02, rtol=0)
    assert (flat[0, :2] - flat[2, :2]).abs().max() > 0.2


def test_the_cell_that_stands_out_most_is_bright_in_its_colour() -> None:
    tokens = torch.randn(1, 12, 5)
    centred = tokens[0] - tokens[0].mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    colours = rgb_map(tokens, (3, 4))[0].flatten(0, 1)
    for component in range(3):
        peak = (centred @ directions[:, -1 - component]).abs().argmax()
        assert colours[peak, component] > 0.9


def test_a_sheet_shows_every_map_twice() -> None:
    maps = {"numbers": torch.rand(2, 3), "colours": torch.rand(2, 3, 3)}
    one, two = (Image.open(io.BytesIO(map_sheet(PICTURE, some))) for some in ({"numbers": maps["numbers"]}, maps))
    assert (one.height, two.width) == (two.height, pytest.approx(one.width * 1.5, abs=2))


def test_a_common_scale_keeps_maps_comparable() -> None:
    """The low map has the colour of its share of the highest value; on its own scale, a constant has the lowest."""
    maps = {"low": torch.full((2, 2), 0.5), "high": torch.full((2, 2), 1.0)}
    middle = (33, 145, 140)  # of viridis

    def shows_middle(common_scale: bool) -> bool:
        sheet = Image.open(io.BytesIO(map_sheet(PICTURE, maps, common_scale=common_scale))).convert("RGB")
        return bool((np.abs(np.asarray(sheet).astype(int) - middle).sum(-1) < 9).any())

    assert shows_middle(True)
    assert not shows_middle(False)


def test_points_lie_where_the_fuser_reads() -> None:
    features = random_features(8, num_layers=3, grids=(4, 6))
    fuser = create_fuser("mmfuser", in_channels=8, num_layers=3, options={"num_heads": 2, "num_points": 2})
    locations, weights = fuser.sampling_points(features)
    assert (locations.shape, weights.shape) == ((2, 24, 2, 2, 2, 2), (2, 24, 2, 2, 2))
    assert_close(weights.sum((-1, -2)), torch.ones(2, 24, 2))
    # A new head 0 looks right, one cell and two cells away, from the centre of the query's cell (here row 1, column 2).
    centre = torch.tensor([2.5 / 6, 1.5 / 4])
    expected = torch.stack([centre + torch.tensor([step / 6, 0.0]) for step in (1, 2)])
    assert_close(locations[0, 1 * 6 + 2, 0, 0], expected)
    sheet = point_sheet(PICTURE, locations[0], weights[0], grid=(4, 6), cells=[(1, 2)], titles=["layer 1", "layer 2"])
    assert sheet.startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"cells \[\(4, 0\)\] lie outside of the grid 4x6"):
        point_sheet(PICTURE, locations[0], weights[0], grid=(4, 6), cells=[(4, 0)], titles=["layer 1", "layer 2"])


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit the grid 2x2"):
        rgb_map(torch.zeros(1, 5, 8), (2, 2))
    with pytest.raises(ValueError, match="three components need 3 tokens and 3 channels"):
        rgb_map(torch.zeros(1, 4, 2), (2, 2))
    with pytest.raises(ValueError, match="map_sheet got no maps"):
        map_sheet(PICTURE, {})
