from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from layerfuse.analysis import fit_probe, probe_layers
from layerfuse.features import FeatureMaps


def maps_with_detail(batch_size: int, labels: torch.Tensor, *, num_classes: int) -> FeatureMaps:
    """Layer 1 holds the class of every cell as a code, layer 2 is noise."""
    codes = torch.randn(num_classes, 16, generator=torch.Generator().manual_seed(1))
    clear = codes[labels.clamp_min(0)] + 0.1 * torch.randn(*labels.shape, 16)
    return FeatureMaps((clear, torch.randn(*labels.shape, 16)), layers=(1, 2), grids=((2, 3),) * 2)


def test_probe_of_separable_classes_is_exact() -> None:
    labels = torch.arange(60) % 3
    tokens = torch.nn.functional.one_hot(labels, 3).double() * 2 + 7
    probe = fit_probe(tokens, labels, num_classes=3)
    assert_close(probe.predict(tokens), labels)
    assert probe.accuracy(tokens, labels) == 1.0


def test_probe_without_information_predicts_the_class_frequencies() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    probe = fit_probe(torch.ones(4, 5), labels, num_classes=2)
    assert_close(probe.scores(torch.ones(2, 5)), torch.tensor([[0.75, 0.25]] * 2, dtype=torch.float64))


def test_probe_equals_ridge_regression_of_numpy() -> None:
    import numpy as np

    tokens, labels = torch.randn(40, 5, dtype=torch.float64), torch.arange(40) % 4
    probe = fit_probe(tokens, labels, num_classes=4, penalty=0.3)
    inputs = tokens.numpy()
    scaled = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = np.eye(4)[labels.numpy()]
    # Ridge regression as ordinary least squares on rows that are appended for the penalty.
    stacked = np.vstack([scaled, np.sqrt(0.3 * 40) * np.eye(5)])
    weight, *_ = np.linalg.lstsq(stacked, np.vstack([targets - targets.mean(0), np.zeros((5, 4))]), rcond=None)
    assert_close(probe.scores(tokens), torch.from_numpy(scaled @ weight + targets.mean(0)))


def test_probe_finds_the_layer_that_holds_the_detail() -> None:
    train_labels, test_labels = torch.randint(-1, 4, (60, 6)), torch.randint(-1, 4, (30, 6))
    accuracy = probe_layers(
        maps_with_detail(60, train_labels, num_classes=4),
        train_labels,
        maps_with_detail(30, test_labels, num_classes=4),
        test_labels,
        num_classes=4,
    )
    assert list(accuracy) == [1, 2]
    assert accuracy[1] == 1.0
    assert accuracy[2] < 0.5


def test_tokens_and_labels_of_other_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"got tokens \(4, 2\) and labels \(3,\)"):
        fit_probe(torch.zeros(4, 2), torch.zeros(3), num_classes=2)


def test_label_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"labels run from 0 to 2; allowed are 0\.\.1"):
        fit_probe(torch.zeros(3, 2), torch.tensor([0, 1, 2]), num_classes=2)


def test_penalty_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="penalty=0 is not positive"):
        fit_probe(torch.zeros(3, 2), torch.tensor([0, 1, 1]), num_classes=2, penalty=0)


def test_other_layers_in_train_and_test_are_an_error() -> None:
    labels = torch.zeros(2, 6, dtype=torch.long)
    features = maps_with_detail(2, labels, num_classes=1)
    other = FeatureMaps(features.maps, layers=(3, 4), grids=features.grids)
    with pytest.raises(ValueError, match=r"train has layers \(1, 2\), test has \(3, 4\)"):
        probe_layers(features, labels, other, labels, num_classes=1)


def test_labels_of_another_grid_are_an_error() -> None:
    labels = torch.zeros(2, 6, dtype=torch.long)
    features = maps_with_detail(2, labels, num_classes=1)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\), the map of layer 1 has \(2, 6, 16\)"):
        probe_layers(features, labels[:, :4], features, labels, num_classes=1)


def test_cells_without_any_label_are_an_error() -> None:
    labels = torch.full((2, 6), -1)
    features = maps_with_detail(2, labels, num_classes=1)
    with pytest.raises(ValueError, match=r"every label is -1"):
        probe_layers(features, labels, features, labels, num_classes=1)
