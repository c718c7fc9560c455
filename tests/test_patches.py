"""Patch features for anomaly detection."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from layerfuse.patches import patch_features
from layerfuse.testing import random_features


def test_patch_features_are_those_of_the_published_code() -> None:
    """Unfolded neighbourhoods with zeros around the map, averaged for each channel; coarser maps resampled."""
    features = random_features([3, 5], grids=[(6, 4), (3, 2)])
    expected = []
    for index in range(2):
        image = features.nchw(index)
        around = F.unfold(image, 3, padding=1).view(2, image.shape[1], 9, -1)
        expected.append(around.mean(2).view_as(image))
    expected[1] = F.interpolate(expected[1], size=(6, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(patch_features(features), torch.cat(expected, dim=1))


def test_a_neighbourhood_of_one_cell_leaves_maps_as_they_are() -> None:
    features = random_features(3, num_layers=2, grids=(2, 3))
    torch.testing.assert_close(patch_features(features, 1)[:, 3:], features.nchw(1), rtol=0, atol=0)


@pytest.mark.parametrize("edge", [0, 2])
def test_a_neighbourhood_without_a_middle_is_refused(edge: int) -> None:
    with pytest.raises(ValueError, match=f"neighbourhood is {edge}; give an odd number"):
        patch_features(random_features(), edge)
