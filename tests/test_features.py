"""FeatureMaps: a value that checks itself and carries its geometry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerfuse import FeatureMaps


def test_properties_describe_the_maps() -> None:
    maps = (torch.zeros(2, 6, 8), torch.zeros(2, 4, 5))
    features = FeatureMaps(maps=maps, layers=(3, 0), grids=((2, 3), (4, 1)))
    assert (len(features), features.batch_size, features.channels) == (2, 2, (8, 5))
    assert [feature_map.shape for feature_map in features] == [(2, 6, 8), (2, 4, 5)]


@given(height=st.integers(1, 5), width=st.integers(1, 5), channels=st.integers(1, 4))
def test_spatial_unfolds_rows_first_without_a_copy(height: int, width: int, channels: int) -> None:
    tokens = torch.arange(height * width * channels, dtype=torch.float32).reshape(1, height * width, channels)
    features = FeatureMaps(maps=(tokens,), layers=(1,), grids=((height, width),))
    spatial = features.spatial(0)
    assert spatial.shape == (1, channels, height, width)
    torch.testing.assert_close(
        spatial[0, :, height - 1, width - 1], tokens[0, (height - 1) * width + width - 1], rtol=0, atol=0
    )
    assert spatial.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()


def test_layer_returns_the_map_of_that_number() -> None:
    features = FeatureMaps(maps=(torch.zeros(1, 1, 2), torch.ones(1, 1, 2)), layers=(4, 2), grids=((1, 1), (1, 1)))
    torch.testing.assert_close(features.layer(2), torch.ones(1, 1, 2))
    with pytest.raises(KeyError, match="layer 3 was not tapped; tapped layers: 4, 2"):
        features.layer(3)


@pytest.mark.parametrize(
    ("maps", "layers", "grids", "prefix", "message"),
    [
        ((), (), (), (), "at least one map"),
        ((torch.zeros(1, 4, 2),), (1, 2), ((2, 2),), (), "1 maps, 2 layers, 1 grids"),
        ((torch.zeros(1, 4, 2),), (1,), ((2, 2),), (torch.zeros(1, 1, 2),) * 2, "2 prefix tensors"),
        ((torch.zeros(4, 2),), (1,), ((2, 2),), (), r"shape \(4, 2\); expected three dimensions"),
        ((torch.zeros(1, 5, 2),), (7,), ((2, 2),), (), "layer 7 has 5 tokens, but its grid 2x2 has 4"),
        (
            (torch.zeros(1, 4, 2), torch.zeros(2, 4, 2)),
            (1, 2),
            ((2, 2), (2, 2)),
            (),
            "layer 2 has batch size 2, the first map has 1",
        ),
    ],
)
def test_disagreeing_fields_are_refused(maps, layers, grids, prefix, message) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureMaps(maps=maps, layers=layers, grids=grids, prefix=prefix)
