"""What can still be read off each layer of the embedded backbone, by a linear probe on single tokens.

Each probe is a multinomial logistic regression on the token of one cell: the character in it, or the colour
or the shape of the object in it. A token of a late layer that has let the character go cannot name it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from integrations.llava.synthetic.rendering import render_array
from integrations.llava.synthetic.scene import CHARACTERS, COLORS, GRID, SHAPES, Scene, sample_scene

__all__ = ["PROBES", "linear_probe", "probe_layers"]

Encoder = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""(B, H, W, 3) uint8 images -> one (B, N, C) map of patch tokens a layer."""

PROBES: Mapping[str, int] = {"character": len(CHARACTERS), "color": len(COLORS), "shape": len(SHAPES)}
"""What is probed, and the number of classes."""


def probe_layers(
    encode: Encoder, *, num_train: int = 1200, num_test: int = 400, seed: int = 3000
) -> list[dict[str, float]]:
    """Probe every layer.

    Args:
        encode: the backbone.
        num_train: scenes of the train split that the probes are fitted on.
        num_test: scenes of the test split that they are scored on.
        seed: of the scenes.

    Returns:
        For each layer, in the order that `encode` gives them, the test accuracy of each of `PROBES`.
    """
    train_maps, train_labels = _encode(encode, num_train, "train", seed)
    test_maps, test_labels = _encode(encode, num_test, "test", seed)
    results = []
    for train_map, test_map in zip(train_maps, test_maps, strict=True):
        accuracy = {}
        for name, num_classes in PROBES.items():
            fit, score = train_labels[name], test_labels[name]
            accuracy[name] = linear_probe(
                train_map[fit[:, 0], fit[:, 1]],
                fit[:, 2],
                test_map[score[:, 0], score[:, 1]],
                score[:, 2],
                num_classes=num_classes,
            )
        results.append(accuracy)
    return results


def linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    num_classes: int,
    num_steps: int = 300,
) -> float:
    """Fit a multinomial logistic regression and return its test accuracy.

    Args:
        features: (n, C) to fit on; each channel is standardised.
        labels: (n,) classes.
        test_features: (m, C).
        test_labels: (m,) classes.
        num_classes: number of classes.
        num_steps: full-batch Adam steps.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, test_features = (features - mean) / std, (test_features - mean) / std
    weight = torch.zeros(features.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=0.03, weight_decay=0.05)
    for _ in range(num_steps):
        loss = F.cross_entropy(features @ weight + bias, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        guessed = (test_features @ weight + bias).argmax(1)
    return float((guessed == test_labels).float().mean())


def _encode(encode: Encoder, count: int, split: str, seed: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Encode scenes: maps (count, N, C) a layer, and for each probe rows (scene, token, class)."""
    scenes = [sample_scene(np.random.default_rng([seed, index]), split) for index in range(count)]
    batches: list[Sequence[torch.Tensor]] = []
    with torch.no_grad():
        for start in range(0, count, 100):
            images = np.stack([render_array(scene) for scene in scenes[start : start + 100]])
            batches.append(encode(torch.from_numpy(images)))
    maps = [torch.cat(layer).float() for layer in zip(*batches, strict=True)]
    rows: dict[str, list[tuple[int, int, int]]] = {name: [] for name in PROBES}
    for index, scene in enumerate(scenes):
        for name, found in _labels(scene).items():
            rows[name] += [(index, token, label) for token, label in found]
    return maps, {name: torch.tensor(found) for name, found in rows.items()}


def _labels(scene: Scene) -> dict[str, list[tuple[int, int]]]:
    """Return (token, class) pairs for each probe; large objects are read at their first cell."""
    first = scene.text.row * GRID + scene.text.column
    places = [(item.row * GRID + item.column, item) for item in scene.objects]
    return {
        "character": [(first + i, CHARACTERS.index(c)) for i, c in enumerate(scene.text.string)],
        "color": [(token, COLORS.index(item.color)) for token, item in places],
        "shape": [(token, SHAPES.index(item.shape)) for token, item in places],
    }
