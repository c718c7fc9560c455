from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from layerfuse.analysis import layer_similarity, linear_cka, mean_cosine
from layerfuse.features import FeatureMaps
from layerfuse.testing import random_features


def test_cka_ignores_rotation_shift_and_scale() -> None:
    rows = torch.randn(50, 6, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert_close(linear_cka(rows, 3 * rows @ rotation + 5), torch.tensor(1.0, dtype=torch.float64))


def test_cka_of_orthogonal_features_is_zero() -> None:
    first = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    second = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert_close(linear_cka(first, second), torch.tensor(0.0, dtype=torch.float64))


def test_cka_of_single_channels_is_the_squared_correlation() -> None:
    first, second = torch.randn(2, 40, 1, dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack([first[:, 0], second[:, 0]]))[0, 1]
    assert_close(linear_cka(first, second), correlation.square())


def test_cka_of_a_constant_is_zero() -> None:
    assert_close(linear_cka(torch.ones(5, 3), torch.randn(5, 3)), torch.tensor(0.0, dtype=torch.float64))


@pytest.mark.parametrize("shapes", [((4, 2), (5, 2)), ((4,), (4,)), ((1, 2), (1, 2)), ((2, 3, 4), (2, 3, 4))])
def test_cka_of_unpaired_rows_is_an_error(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"linear_cka got shapes .* flatten batch and tokens"):
        linear_cka(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_layer_similarity_compares_every_pair() -> None:
    features = random_features((4, 6, 4), grids=(3, 5))
    similarity = layer_similarity(features)
    assert similarity.shape == (3, 3)
    assert_close(similarity, similarity.T)
    assert_close(similarity.diagonal(), torch.ones(3, dtype=torch.float64))
    assert_close(similarity[0, 2], linear_cka(features.maps[0].flatten(0, 1), features.maps[2].flatten(0, 1)))


def test_layer_similarity_of_different_grids_is_an_error() -> None:
    features = random_features(4, grids=[(2, 2), (2, 3)])
    assert isinstance(features, FeatureMaps)
    with pytest.raises(ValueError, match="tap layers of one grid"):
        layer_similarity(features)


def test_cosine_is_the_mean_over_tokens() -> None:
    first = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    second = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    assert_close(mean_cosine(first, second), torch.tensor(0.5, dtype=torch.float64))


def test_cosine_of_other_widths_points_to_cka() -> None:
    with pytest.raises(ValueError, match=r"mean_cosine got shapes .* \(measure='cka'\)"):
        layer_similarity(random_features((4, 6), grids=(3, 5)), measure="cosine")


def test_layers_of_two_backbones_are_rows_and_columns() -> None:
    features, others = random_features((4, 6), grids=(3, 5)), random_features((8, 4, 4), grids=(3, 5), seed=1)
    similarity = layer_similarity(features, others)
    assert similarity.shape == (2, 3)
    assert_close(similarity[1, 0], linear_cka(features.maps[1].flatten(0, 1), others.maps[0].flatten(0, 1)))


def test_other_numbers_of_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 and 3 images; .* FeatureMaps.resample"):
        layer_similarity(random_features((4,), batch_size=1), random_features((4,), batch_size=3))


def test_an_unknown_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="measure 'cosin' is unknown; did you mean 'cosine'"):
        layer_similarity(random_features((4,)), measure="cosin")
