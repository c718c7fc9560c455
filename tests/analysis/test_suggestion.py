"""Layers that are suggested: a planted one is found, those that add are added, and noise gives "cannot tell"."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch.testing import assert_close

from layerfuse.analysis import (
    LayerProbes,
    cross_validate_layers,
    edge_labels,
    edge_strength,
    suggest_layers,
)
from layerfuse.features import FeatureMaps

CLASSES = 3


def labelled(
    seed: int, planted: Mapping[int, float], *, num_layers: int = 6, images: int = 60
) -> tuple[FeatureMaps, torch.Tensor]:
    """Return noise of 16 channels for images of three classes; ``planted`` layers carry the class, so strongly."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % CLASSES
    maps = []
    for layer in range(num_layers):
        centres = torch.randn(CLASSES, 16, generator=random) * planted.get(layer, 0.0)
        noise = torch.randn(images, 4, 16, generator=random) + torch.randn(images, 1, 16, generator=random)
        maps.append(noise + centres[labels][:, None])
    return FeatureMaps(tuple(maps), tuple(range(num_layers)), ((2, 2),) * num_layers), labels


def test_a_planted_layer_is_found_in_nine_of_ten_seeds() -> None:
    found = [suggest_layers(*labelled(seed, {4: 0.7}), seed=seed) for seed in range(10)]
    assert sum(suggestion.layers == (4,) for suggestion in found) >= 9
    assert all(suggestion.sure[0] > 0.9 for suggestion in found if suggestion.layers == (4,))
    assert "Layer 4 predicts best alone" in found[0].reasons[0]


def test_a_planted_layer_is_found_by_labels_of_cells() -> None:
    found = 0
    for seed in range(10):
        random = torch.Generator().manual_seed(seed)
        labels = torch.randint(-1, CLASSES, (12, 16), generator=random)
        maps = [torch.randn(12, 16, 8, generator=random) for _ in range(4)]
        maps[1] = maps[1] + torch.randn(CLASSES + 1, 8, generator=random)[labels]
        features = FeatureMaps(tuple(maps), (2, 4, 6, 8), ((4, 4),) * 4)
        found += 4 in suggest_layers(features, labels).layers
    assert found >= 9


def test_noise_cannot_tell() -> None:
    found = [suggest_layers(*labelled(seed, {})) for seed in range(10)]
    assert sum(suggestion.verdict == "cannot tell" for suggestion in found) >= 9
    doubt = found[0]
    assert (doubt.layers, doubt.together) == ((), None)
    assert "No layer predicts the labels better than shuffled ones" in doubt.reasons[0]


def test_layers_that_are_equally_good_cannot_tell() -> None:
    features, labels = labelled(0, {0: 1.0})
    same = features.take([0, 0, 0])
    suggestion = suggest_layers(same, labels)
    assert suggestion.verdict == "cannot tell"
    assert "any layer will do" in suggestion.reasons[0]


def test_a_layer_that_adds_is_taken_and_a_copy_is_left_out() -> None:
    # Layer 1 knows class 0 from the others, layer 3 class 2 from the others; layer 2 is layer 1, turned.
    features, labels = labelled(0, {}, images=120)
    maps = [tokens.clone() for tokens in features.maps]
    direction = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    maps[1] += 2 * direction[0] * (labels == 0)[:, None, None]
    maps[3] += 2 * direction[1] * (labels == 2)[:, None, None]
    maps[2] = maps[1].flip(-1)
    suggestion = suggest_layers(FeatureMaps(tuple(maps), features.layers, features.grids), labels)
    assert suggestion.layers in ((1, 3), (2, 3))
    assert suggestion.together is not None and suggestion.together > max(suggestion.scores.accuracy) + 0.1
    assert any("Say the same as a chosen one (CKA ≥ 0.95)" in reason for reason in suggestion.reasons)
    assert suggestion.verdict.startswith("layers ")


def test_a_kernel_reads_what_ridge_regression_reads() -> None:
    """One fold's predictions, against the primal solution with the intercept that is the targets' mean."""
    features, labels = labelled(0, {0: 0.5}, num_layers=1)
    probes = LayerProbes(features, labels, penalty=0.2)
    rows = features.maps[0].mean(1).double()
    rows = (rows - rows.mean(0)) / rows.std(0, unbiased=False)
    targets = torch.nn.functional.one_hot(labels, CLASSES).double()
    right = torch.empty(len(labels))
    for fold in range(5):
        held, fit = probes.folds == fold, probes.folds != fold
        gram = rows[fit].T @ rows[fit] + 0.2 * 16 * torch.eye(16, dtype=torch.float64)
        mean = targets[fit].mean(0)
        weight = torch.linalg.solve(gram, rows[fit].T @ (targets[fit] - mean))
        right[held] = (rows[held] @ weight + mean).argmax(-1).eq(labels[held]).float()
    assert_close(probes.per_image([0]).float(), right)


def test_scores_are_of_unseen_images() -> None:
    """With as many channels as images, a probe that saw them all would be right on every one."""
    features = FeatureMaps((torch.randn(30, 1, 64),), (0,), ((1, 1),))
    scores = cross_validate_layers(features, torch.arange(30) % 2)
    assert scores.accuracy[0] < 0.8
    assert scores.chance == 0.5
    assert scores.num_labels == 30
    low, high = scores.intervals[0]
    assert low < scores.accuracy[0] < high
    assert scores.p_value > 0.05


def test_chance_is_what_naming_one_class_always_scores() -> None:
    """Five images of 30 cells are of class 0, five with one labelled cell each of class 1: accuracy is by image."""
    labels = torch.zeros(10, 30, dtype=torch.long)
    labels[5:] = -1
    labels[5:, 0] = 1
    features = FeatureMaps((torch.zeros(10, 30, 4),), (0,), ((5, 6),))
    scores = cross_validate_layers(features, labels)
    assert scores.chance == 0.5
    assert scores.accuracy[0] <= 0.5 + 1e-9  # the maps tell nothing


@pytest.mark.parametrize("of_cells", [False, True])
def test_a_rare_class_keeps_two_images_when_labels_are_left_out(of_cells: bool) -> None:
    if of_cells:
        labels = torch.zeros(8, 50, dtype=torch.long)
        labels[:, :25], labels[3, 40], labels[6, 41] = 1, 2, 2
        maps, grid = torch.randn(8, 50, 4), (5, 10)
    else:
        labels = torch.arange(300) % 2
        labels[[100, 200]] = 2
        maps, grid = torch.randn(300, 1, 4), (1, 1)
    probes = LayerProbes(FeatureMaps((maps,), (0,), (grid,)), labels, max_samples=40)
    assert (probes._labels == 2).sum() == 2
    assert 40 <= probes.num_labels <= 42
    assert_close(probes.rows[0][probes._labels == 2].float(), maps[labels == 2] if of_cells else maps[labels == 2, 0])


def test_edges_are_where_brightness_changes() -> None:
    images = torch.zeros(1, 3, 8, 8)
    images[..., 6:] = 1.0
    strength = edge_strength(images, (2, 2))
    assert_close(strength, torch.tensor([[0.0, 0.25, 0.0, 0.25]]))
    assert edge_labels(torch.tensor([[0.0, 3.0], [1.0, 2.0]]), 4).tolist() == [[0, 3], [1, 2]]
    assert edge_labels(torch.tensor([[0.0, torch.nan], [1.0, 2.0]]), 3).tolist() == [[0, -1], [1, 2]]


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        (torch.zeros(7, dtype=torch.long), {}, "give one label an image"),
        (torch.zeros(60, dtype=torch.long), {}, "labels of 1 classes are too few"),
        (torch.tensor([1] + [0] * 59), {}, r"classes \[1\] stand in one image only"),
        (torch.arange(60) % 2, {"max_layers": 0}, "max_layers is 0"),
        (torch.arange(60) % 2, {"redundant": 1.5}, "redundant 1.5"),
        (torch.arange(60) % 2, {"penalty": 0.0}, "penalty=0.0 is not positive"),
    ],
)
def test_what_cannot_be_probed_is_refused(labels: torch.Tensor, options: dict[str, float], says: str) -> None:
    features, _ = labelled(0, {}, num_layers=2)
    with pytest.raises(ValueError, match=says):
        suggest_layers(features, labels, **options)  # type: ignore[arg-type]


def test_edges_of_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="edge_strength got shape"):
        edge_strength(torch.zeros(3, 8, 8), (2, 2))
    with pytest.raises(ValueError, match="num_classes is 1"):
        edge_labels(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="no cell has a strength"):
        edge_labels(torch.full((4,), torch.nan))
