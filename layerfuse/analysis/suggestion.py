"""Which layers to tap for a task, why, and how sure that is; "cannot tell" where differences are within the noise.

Forward selection: the layer that predicts best alone, then the one that adds most to those chosen, as long as it adds
more than chance would. A layer that says much the same as a chosen one (linear CKA) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerfuse.analysis.cross_validation import LayerProbes, LayerScores, bootstrap_means
from layerfuse.analysis.similarity import linear_cka
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps

__all__ = ["LayerSuggestion", "suggest_layers"]

# Share of cases in which chance may be taken for a difference. Low, since probes that learned from the same images err
# together, which the tests do not see.
_LEVEL = 0.01
_SHUFFLES = 1000


@dataclass(frozen=True)
class LayerSuggestion:
    """Layers to tap, in ascending order; none where the images cannot tell.

    Attributes:
        layers: L' layer numbers.
        sure: of each, the share of resamples of the images that choose it, too: as the best, or as one that adds.
        reasons: why, or why not, in sentences.
        scores: of every layer alone.
        together: share of right labels that the layers have together; None if there are none.
    """

    layers: tuple[int, ...]
    sure: tuple[float, ...]
    reasons: tuple[str, ...]
    scores: LayerScores
    together: float | None

    @property
    def verdict(self) -> str:
        """The suggestion in a line: layers and how sure they are, or "cannot tell"."""
        if not self.layers:
            return "cannot tell"
        named = (f"{layer} ({sure:.0%} sure)" for layer, sure in zip(self.layers, self.sure, strict=True))
        return ("layers " if len(self.layers) > 1 else "layer ") + ", ".join(named)


def suggest_layers(
    features: FeatureMaps,
    labels: torch.Tensor,
    *,
    max_layers: int = 5,
    redundant: float = 0.95,
    penalty: float = 1.0,
    max_samples: int = 1024,
    seed: int = 0,
) -> LayerSuggestion:
    """Suggest a few layers that together predict labels best and do not say the same.

    Args:
        features: L maps of B images, of all layers that come into question; the layers have names of their own.
        labels: (B,) classes of images, read off the mean of their tokens; or (B, N) of cells, -1 where there is none.
        max_layers: as many layers at most.
        redundant: linear CKA with a chosen layer from which on a layer is left out, in (0, 1].
        penalty: see `LayerProbes`.
        max_samples: labels that are used; more are left out at random, but each class keeps two images.
        seed: of folds, shuffles and what is left out.

    Raises:
        ValueError: if labels do not fit the maps, are too few to leave some out, or an argument is out of range.
    """
    if max_layers < 1 or not 0 < redundant <= 1:
        raise InputError(
            f"max_layers is {max_layers} and redundant {redundant}; give at least 1 layer and a CKA in (0, 1]."
        )
    probes = LayerProbes(features, labels, penalty=penalty, max_samples=max_samples, seed=seed)
    scores = probes.scores()
    if doubt := _doubt(scores, seed):
        return LayerSuggestion((), (), (doubt,), scores, None)
    chosen, sure, reasons = _first(scores)
    per_image = scores.per_image[chosen[0]]
    while len(chosen) < max_layers:
        found, reason = _next(probes, chosen, per_image, redundant)
        reasons.append(reason)
        if found is None:
            break
        position, confidence, per_image = found
        chosen.append(position)
        sure.append(confidence)
    order = sorted(range(len(chosen)), key=lambda place: scores.layers[chosen[place]])
    return LayerSuggestion(
        tuple(scores.layers[chosen[place]] for place in order),
        tuple(sure[place] for place in order),
        tuple(reasons),
        scores,
        float(per_image.mean()),
    )


def _doubt(scores: LayerScores, seed: int) -> str:
    """Return why the scores cannot tell layers apart, or "" if they can."""
    if scores.p_value > _LEVEL:
        return (
            f"No layer predicts the labels better than shuffled ones: the best has {max(scores.accuracy):.1%}, and "
            f"with shuffled labels the best has as much in {scores.p_value:.1%} of cases, and {_LEVEL:.0%} is allowed. "
            "More images, or other labels."
        )
    # If layers did not differ, each image's scores could as well change places among them.
    random = torch.Generator().manual_seed(seed)
    observed = scores.per_image.mean(1).var(correction=0)
    spread = torch.empty(_SHUFFLES, dtype=observed.dtype)
    for index in range(_SHUFFLES):
        places = torch.rand(scores.per_image.shape, generator=random).argsort(0)
        spread[index] = scores.per_image.gather(0, places).mean(1).var(correction=0)
    p_value = (1 + int((spread >= observed - 1e-12).sum())) / (1 + _SHUFFLES)
    if p_value <= _LEVEL:
        return ""
    return (
        f"Layers predict the labels ({max(scores.accuracy):.1%} right, chance {scores.chance:.1%}), but they differ no "
        f"more than chance makes them (p = {p_value:.2f}): any layer will do, or more images are needed."
    )


def _first(scores: LayerScores) -> tuple[list[int], list[float], list[str]]:
    """Return the position of the best layer, how sure it is, and why; each in a list."""
    best = int(scores.per_image.mean(1).argmax())
    means = bootstrap_means(scores.per_image)
    # Layers that are equally good in a resample share it.
    winners = (means >= means.amax(0) - 1e-9).double()
    sure = float((winners / winners.sum(0))[best].mean())
    low = (means[best] - means).quantile(_LEVEL / 2, dim=1)
    tied = [str(layer) for i, layer in enumerate(scores.layers) if i != best and low[i] <= 0]
    also = f" Within the noise as good: {', '.join(tied)}." if tied else " No other layer comes near."
    reason = (
        f"Layer {scores.layers[best]} predicts best alone: {scores.accuracy[best]:.1%} right on images that the probe "
        f"has not seen (chance {scores.chance:.1%}).{also}"
    )
    return [best], [sure], [reason]


def _next(
    probes: LayerProbes, chosen: list[int], per_image: torch.Tensor, redundant: float
) -> tuple[tuple[int, float, torch.Tensor] | None, str]:
    """Return the layer that adds most to those chosen (position, how sure, scores with it), or None; and why."""
    alike = {
        position: max(float(linear_cka(probes.rows[position], probes.rows[other])) for other in chosen)
        for position in range(len(probes.layers))
        if position not in chosen
    }
    candidates = [position for position, cka in alike.items() if cka < redundant]
    left_out = [str(probes.layers[position]) for position in alike if position not in candidates]
    same = f" Say the same as a chosen one (CKA ≥ {redundant:g}): {', '.join(left_out)}." if left_out else ""
    if not candidates:
        return None, f"No other layer is left.{same}"
    joint = torch.stack([probes.per_image([*chosen, position]) for position in candidates])
    best = int(joint.mean(1).argmax())
    gains = bootstrap_means((joint[best] - per_image)[None])[0]
    gain, layer = float(joint[best].mean() - per_image.mean()), probes.layers[candidates[best]]
    # The best of many is good by chance, too: the level is shared by all candidates.
    if float(gains.quantile(_LEVEL / len(candidates))) <= 0:
        return (
            None,
            f"No other layer adds more than chance would; the best, {layer}, adds {100 * gain:+.1f} points.{same}",
        )
    reason = f"Layer {layer} adds {100 * gain:.1f} points; linear CKA {alike[candidates[best]]:.2f} with those chosen."
    return (candidates[best], float((gains > 0).double().mean()), joint[best]), reason
