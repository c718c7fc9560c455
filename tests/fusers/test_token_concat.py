"""token_concat: all maps' tokens in a row, with the query map's on the grid."""

from __future__ import annotations

import pytest
import torch

from layerfuse.features import Grid
from layerfuse.fusers import Select, TokenConcat
from layerfuse.testing import random_features

SIZES: list[Grid] = [(2, 3), (1, 1), (4, 2)]


@pytest.mark.parametrize("index", [0, 1, 2, -1, -3])
def test_parity_with_the_maps_side_by_side(index: int) -> None:
    features = random_features(8, grids=SIZES)
    fuser = TokenConcat(8, 3, query_index=index)
    fused = fuser(features)
    assert torch.equal(fused, torch.cat(features.maps, dim=1))
    extra = fuser.extra_tokens(SIZES)
    height, width = fuser.out_grid(SIZES)
    assert fuser.num_tokens(SIZES) == 15 == fused.shape[1] and fuser.cost(SIZES).flops == 0
    on_grid = fused[:, extra.front : extra.front + height * width]
    assert torch.equal(on_grid, Select(8, 3, index=index)(features))
    assert (height, width) == SIZES[index] and extra.front + height * width + extra.behind == 15


@pytest.mark.parametrize("num_layers", [1, 24])
def test_any_number_of_layers_is_taken(num_layers: int) -> None:
    features = random_features(4, num_layers=num_layers, grids=(2, 3))
    assert TokenConcat(4, num_layers)(features).shape == (2, 6 * num_layers, 4)
    assert TokenConcat(4, num_layers).extra_tokens(features.grids) == (6 * (num_layers - 1), 0)


@pytest.mark.parametrize("index", [3, -4])
def test_a_query_that_is_not_there_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"query_index {index} is outside the 3 maps; allowed: -3..2"):
        TokenConcat(8, 3, query_index=index)
