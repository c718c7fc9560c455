"""Linear probes: how much of what a cell shows can be read off its patch token, layer by layer.

Alain & Bengio, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644. The classifier is
ridge regression on one-hot targets in closed form: no step size, no seed, the same result every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps

__all__ = ["LinearProbe", "fit_probe", "probe_layers"]


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of patch tokens.

    Attributes:
        weight: (C, num_classes).
        bias: (num_classes,).
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scores of all classes: (..., C) tokens give (..., num_classes)."""
        return tokens.to(self.weight.dtype) @ self.weight + self.bias

    def predict(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the best class of each token: (..., C) tokens give (...) class numbers."""
        return self.scores(tokens).argmax(-1)

    def accuracy(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        """Return the share of (S, C) tokens whose class is the one of their (S,) labels."""
        return (self.predict(tokens) == labels).double().mean().item()


def fit_probe(tokens: torch.Tensor, labels: torch.Tensor, *, num_classes: int, penalty: float = 1e-2) -> LinearProbe:
    """Return a linear classifier, fitted by ridge regression on one-hot targets; it takes tokens as they are.

    Channels are standardised first, so that one penalty suits layers of any scale.

    Args:
        tokens: (S, C) patch tokens.
        labels: (S,) integer class numbers, 0..num_classes - 1.
        num_classes: how many classes there are.
        penalty: weight of the squared parameters per sample, relative to channels of variance 1; above 0.

    Raises:
        ValueError: if shapes disagree, there is no token, a label is out of range, or the penalty is not positive.
    """
    if tokens.ndim != 2 or labels.shape != tokens.shape[:1] or len(tokens) == 0:
        raise InputError(
            f"fit_probe got tokens {tuple(tokens.shape)} and labels {tuple(labels.shape)}; expected (S, C) and (S,) "
            "with S above 0."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; allowed are 0..{num_classes - 1} "
            f"(num_classes={num_classes}). Leave out tokens without a label."
        )
    if penalty <= 0:
        raise InputError(f"penalty={penalty} is not positive; without one the closed form need not exist. Try 1e-2.")
    inputs = tokens.double()
    mean = inputs.mean(0)
    scale = inputs.std(0, unbiased=False).clamp_min(1e-8)
    inputs = (inputs - mean) / scale
    targets = torch.nn.functional.one_hot(labels.long(), num_classes).double()
    offset = targets.mean(0)
    gram = inputs.T @ inputs / len(inputs)
    gram.diagonal().add_(penalty)
    weight = torch.linalg.solve(gram, inputs.T @ (targets - offset) / len(inputs)) / scale[:, None]
    return LinearProbe(weight=weight, bias=offset - mean @ weight)


def probe_layers(
    train: FeatureMaps,
    train_labels: torch.Tensor,
    test: FeatureMaps,
    test_labels: torch.Tensor,
    *,
    num_classes: int,
    penalty: float = 1e-2,
    ignore: int = -1,
) -> dict[int, float]:
    """Fit one probe a layer and return its share of right answers on images it has not seen, by layer number.

    Args:
        train: L maps of the images to fit on.
        train_labels: (B, N) class number of every cell, row-major over the grid; ``ignore`` where there is none.
        test: the same layers, of other images.
        test_labels: (B', N) likewise.
        num_classes: how many classes there are.
        penalty: see `fit_probe`.
        ignore: the label of cells that take no part.

    Raises:
        ValueError: if the two sets hold different layers, labels do not fit the maps, or no cell has a label.
    """
    if train.layers != test.layers:
        raise InputError(f"train has layers {train.layers}, test has {test.layers}; tap the same layers in both.")
    accuracies: dict[int, float] = {}
    for layer, train_map, test_map in zip(train.layers, train.maps, test.maps, strict=True):
        fit_tokens, fit_labels = _labelled(train_map, train_labels, ignore=ignore, layer=layer)
        held_tokens, held_labels = _labelled(test_map, test_labels, ignore=ignore, layer=layer)
        probe = fit_probe(fit_tokens, fit_labels, num_classes=num_classes, penalty=penalty)
        accuracies[layer] = probe.accuracy(held_tokens, held_labels)
    return accuracies


def _labelled(
    feature_map: torch.Tensor, labels: torch.Tensor, *, ignore: int, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if labels.shape != feature_map.shape[:2]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, the map of layer {layer} has {tuple(feature_map.shape)}; "
            "give one label per image and cell, (B, N)."
        )
    chosen = labels != ignore
    if not chosen.any():
        raise InputError(f"every label is {ignore} (ignored); a probe needs at least one labelled cell.")
    return feature_map[chosen], labels[chosen]
