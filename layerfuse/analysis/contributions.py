"""What each layer contributes to a fuser: how far the fused tokens move without it, and what the fuser itself says.

Ablation works on any fuser. With f the fuser, x the maps, r what stands for a layer that is taken away (its mean token,
or zeros), and x_l the maps with layer l alone replaced:

    moved_l = |f(x) - f(x_l)| / |f(x) - f(r)|

where norms go over all fused tokens and images: 1 is as far as they move when every layer is taken away. A fuser that
reads one layer alone has 1 there and 0 elsewhere, the average of L equal layers 1/L everywhere. Shares need not sum to
1: below, layers stand in for one another; above, they pull against one another, or work only together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps
from layerfuse.fusers import Fuser

__all__ = ["LayerContributions", "WeighsLayers", "layer_contributions", "mean_features"]


@runtime_checkable
class WeighsLayers(Protocol):
    """A fuser that says how much each layer counts by its own weights."""

    def layer_shares(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return (B, L), or (B, L, H, W) on the grid of the fused tokens, which sum to one over L; or None."""


@dataclass(frozen=True)
class LayerContributions:
    """What L layers contribute to the fused tokens of B images.

    Attributes:
        layers: L layer numbers.
        sources: L positions of their backbones; empty if there is one.
        squares: (B, L) squared distance of the fused tokens to those without each layer.
        totals: (B,) squared distance to those without any.
        cells: (B, L, H, W) parts of the squares by cell; None if the fused tokens lie on no grid.
        own: (B, L) or (B, L, H, W), what the fuser says of itself (`WeighsLayers`); None if it does not.
    """

    layers: tuple[int, ...]
    sources: tuple[int, ...]
    squares: torch.Tensor
    totals: torch.Tensor
    cells: torch.Tensor | None
    own: torch.Tensor | None

    @property
    def moved(self) -> torch.Tensor:
        """How far the fused tokens move without each layer, (L,); see the module's equation. Zero if nothing moves."""
        return (self.squares.sum(0) / self.totals.sum().clamp_min(1e-30)).sqrt()

    @property
    def moved_maps(self) -> torch.Tensor | None:
        """The same by cell, (B, L, H, W): 1 is as far as a cell moves without any layer, in the mean square."""
        if self.cells is None:
            return None
        mean = self.totals.sum() / (len(self.totals) * self.cells[0, 0].numel())
        return (self.cells / mean.clamp_min(1e-30)).sqrt()

    @property
    def own_shares(self) -> torch.Tensor | None:
        """What the fuser says of itself, mean over images and cells: (L,), sums to one."""
        return None if self.own is None else self.own.reshape(*self.own.shape[:2], -1).mean((0, 2))

    @classmethod
    def cat(cls, parts: Sequence[LayerContributions]) -> LayerContributions:
        """Return the contributions of several batches as those of one.

        Raises:
            ValueError: if there are none.
        """
        if not parts:
            raise InputError("LayerContributions.cat got none; give those of at least one batch.")
        cells = [part.cells for part in parts if part.cells is not None]
        own = [part.own for part in parts if part.own is not None]
        return replace(
            parts[0],
            squares=torch.cat([part.squares for part in parts]),
            totals=torch.cat([part.totals for part in parts]),
            cells=torch.cat(cells) if len(cells) == len(parts) else None,
            own=torch.cat(own) if len(own) == len(parts) else None,
        )


def layer_contributions(
    fuser: Fuser,
    features: FeatureMaps,
    *,
    condition: torch.Tensor | None = None,
    reference: FeatureMaps | None = None,
) -> LayerContributions:
    """Measure what each layer contributes to the fused tokens.

    Args:
        fuser: trained; it is run L + 2 times, without gradients, as it is: call ``eval()`` first.
        features: L maps, each (B, N_l, C_l).
        condition: (B, D_c), for a fuser with ``condition_channels``.
        reference: maps that stand for layers that are taken away, of one image, B = 1: `mean_features` of ``features``
            if None; of more images where these are one batch of several; ``.map(torch.zeros_like)`` of those for zeros.

    Raises:
        ValueError: if maps, condition or reference do not fit the fuser.
    """
    away = mean_features([features]) if reference is None else reference
    if (away.grids, away.channels, away.batch_size) != (features.grids, features.channels, 1):
        raise InputError(
            f"the reference has grids {away.grids}, widths {away.channels} and {away.batch_size} images, and the maps "
            f"have grids {features.grids} and widths {features.channels}; give maps of the same kind and one image, as "
            "mean_features makes them."
        )
    away = away.map(lambda tokens: tokens.expand(features.batch_size, -1, -1))
    grid, front = fuser.out_grid(features.grids), fuser.extra_tokens(features.grids).front
    with torch.no_grad():
        whole = fuser(features, condition).double()
        without = [fuser(_swapped(features, away, place), condition).double() for place in range(len(features))]
        none = fuser(replace(away, layers=features.layers, sources=features.sources), condition).double()
        own = fuser.layer_shares(features, condition=condition) if isinstance(fuser, WeighsLayers) else None
    squares = torch.stack([(whole - fused).square().sum(-1) for fused in without], dim=1)  # (B, L, N)
    cells = None
    if grid is not None:
        cells = squares[..., front : front + grid[0] * grid[1]].unflatten(-1, grid)
    return LayerContributions(
        features.layers,
        features.sources,
        squares.sum(-1),
        (whole - none).square().sum((1, 2)),
        cells,
        None if own is None else own.double(),
    )


def mean_features(parts: Sequence[FeatureMaps]) -> FeatureMaps:
    """Return maps of one image, B = 1, in which each cell of a layer has the mean of its tokens over cells and images.

    Args:
        parts: batches, which count by their images. Prefix tokens have their mean over images.

    Raises:
        ValueError: if there are none.
    """
    if not parts:
        raise InputError("mean_features got no feature maps; give those of at least one batch.")
    means = [_mean(part) for part in parts]
    sizes = torch.tensor([float(part.batch_size) for part in parts])
    weights = (sizes / sizes.sum()).tolist()
    first = means[0]

    def joined(each: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        columns = zip(*each, strict=True)
        return tuple(
            sum((tokens * w for tokens, w in zip(column, weights, strict=True)), torch.zeros_like(column[0]))
            for column in columns
        )

    return replace(first, maps=joined([mean.maps for mean in means]), prefix=joined([mean.prefix for mean in means]))


def _mean(features: FeatureMaps) -> FeatureMaps:
    maps = tuple(tokens.mean((0, 1), keepdim=True).expand(1, tokens.shape[1], -1) for tokens in features.maps)
    return replace(features, maps=maps, prefix=tuple(tokens.mean(0, keepdim=True) for tokens in features.prefix))


def _swapped(features: FeatureMaps, away: FeatureMaps, place: int) -> FeatureMaps:
    """Return the maps with the one at a position taken from others."""

    def swap(own: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (*own[:place], other[place], *own[place + 1 :]) if own else own

    return replace(features, maps=swap(features.maps, away.maps), prefix=swap(features.prefix, away.prefix))
