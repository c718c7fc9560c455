"""From which height on a layer reads letters, for letters of several heights that were written into pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from layerfuse.analysis.cross_validation import LayerScores, cross_validate_layers
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps

__all__ = ["Legibility", "probe_letters"]


@dataclass(frozen=True)
class Legibility:
    """How well layers tell letters of several heights, on pictures that their probes have not seen.

    Attributes:
        layers: L layer numbers.
        scores: height in pixels -> scores of all layers, from small to large letters.
    """

    layers: tuple[int, ...]
    scores: dict[int, LayerScores]

    @property
    def accuracy(self) -> torch.Tensor:
        """Share of right letters by height and layer, (heights, L)."""
        return torch.tensor([scores.accuracy for scores in self.scores.values()])

    @property
    def legible_from(self) -> tuple[int | None, ...]:
        """Of each layer the smallest height from which on it reads more than half of what chance does not give.

        That is, the accuracy of this height and of all larger ones is above the middle between chance and 1, and stays
        there in 97.5 of 100 resamples of the pictures; None if the largest letters are not read.
        """
        found: list[int | None] = []
        for position in range(len(self.layers)):
            smallest = None
            for height, scores in reversed(self.scores.items()):
                if scores.intervals[position][0] <= (1 + scores.chance) / 2:
                    break
                smallest = height
            found.append(smallest)
        return tuple(found)

    @property
    def verdict(self) -> str:
        """From which height on letters are legible, and in which layers, in a sentence."""
        heights = [height for height in self.legible_from if height is not None]
        if not heights:
            return f"No layer reads letters of {max(self.scores)} pixels or less."
        best = min(heights)
        named = [str(layer) for layer, height in zip(self.layers, self.legible_from, strict=True) if height == best]
        return f"Letters are legible from {best} pixels up, in layer{'s' * (len(named) > 1)} {', '.join(named)}."


def probe_letters(features: FeatureMaps, letters: torch.Tensor, heights: Sequence[int], *, seed: int = 0) -> Legibility:
    """Probe each layer on the letters of each height by themselves.

    Args:
        features: L maps (B, N, C_l) of the tokens that letters stand in.
        letters: (B, N) class numbers.
        heights: of the N letters, in pixels.
        seed: as in `LayerProbes`.

    Raises:
        ValueError: if numbers disagree; else as `LayerProbes`.
    """
    tall = torch.tensor(heights)
    if letters.shape != features.maps[0].shape[:2] or tall.shape != letters.shape[1:]:
        raise InputError(
            f"letters have shape {tuple(letters.shape)}, and there are {len(tall)} heights for "
            f"{tuple(features.maps[0].shape[:2])} tokens; give a letter for each token, (B, N), and N heights."
        )
    scores = {}
    for height in sorted(set(heights)):
        those = (tall == height).nonzero().flatten()
        maps = tuple(tokens[:, those] for tokens in features.maps)
        some = replace(features, maps=maps, prefix=(), grids=((1, len(those)),) * len(maps))
        scores[height] = cross_validate_layers(some, letters[:, those], seed=seed)
    return Legibility(features.layers, scores)
