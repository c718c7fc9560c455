"""How well each layer, or several together, predict labels of images that the probe has not seen, and chance besides.

The probe is kernel ridge regression on one-hot targets, in closed form: the dual of `fit_probe`, in which layers join
by adding their kernels (S, S), whatever their widths. Images are dealt into folds; an image's cells never part.

Noise is measured without assumptions about it: labels are dealt out to other images (a permutation test, Fisher 1935),
and images are drawn anew with replacement (the bootstrap, Efron 1979).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps

__all__ = ["NUM_FOLDS", "LayerProbes", "LayerScores", "bootstrap_means", "cross_validate_layers"]

NUM_FOLDS = 5
"""Parts that images are dealt into, each of which is tested once; there have to be as many images."""
_SHUFFLES = 200
_RESAMPLES = 2000


@dataclass(frozen=True)
class LayerScores:
    """Scores of layers on images that their probes have not seen.

    Attributes:
        layers: L layer numbers.
        per_image: (L, B) share of each image's cells, or of its one label, that is right.
        chance: score of whoever names the same class always, the best one: a mean over images, as the accuracy.
        shuffled: (R,) score of the best layer after the labels were dealt out to other images, each time anew.
        num_labels: labels that were used, of cells or of images.
    """

    layers: tuple[int, ...]
    per_image: torch.Tensor
    chance: float
    shuffled: torch.Tensor
    num_labels: int

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Mean over images, by layer."""
        return tuple(self.per_image.mean(1).tolist())

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """Bounds between which the accuracy of each layer lies in 95 of 100 resamples of the images."""
        means = bootstrap_means(self.per_image)
        low, high = means.quantile(0.025, dim=1), means.quantile(0.975, dim=1)
        return tuple(zip(low.tolist(), high.tolist(), strict=True))

    @property
    def p_value(self) -> float:
        """How often shuffled labels are predicted as well as the true ones, by the best layer of each."""
        better = int((self.shuffled >= max(self.accuracy) - 1e-9).sum())
        return (1 + better) / (1 + len(self.shuffled))


class LayerProbes:
    """Cross-validated probes of layers, alone or together, on the labels of images or of their cells.

    Args:
        features: L maps of B images.
        labels: (B,) classes of images, read off the mean of their tokens; or (B, N) of cells, -1 where there is none.
        penalty: of the squared parameters; 1 is the mean eigenvalue of a kernel.
        max_samples: labels that are used; more are left out at random, but each class keeps two images.
        seed: of folds, shuffles and what is left out.

    Attributes:
        layers: L layer numbers.
        folds: (S,) the fold of each label, 0 to 4.
        rows: L tables (S, C_l) of the tokens that belong to the labels, float64.
        kernels: (L, S, S).

    Raises:
        ValueError: if labels do not fit the maps, or are too few to leave some out.
    """

    def __init__(
        self,
        features: FeatureMaps,
        labels: torch.Tensor,
        *,
        penalty: float = 1.0,
        max_samples: int = 1024,
        seed: int = 0,
    ) -> None:
        if penalty <= 0:
            raise InputError(f"penalty={penalty} is not positive; without one the closed form need not exist. Try 1.")
        self._random = torch.Generator().manual_seed(seed)
        if not (labels >= 0).any():
            raise InputError("no image or cell has a label (all are -1); a probe needs some of at least two classes.")
        self.layers, self.penalty = features.layers, penalty
        tables = _as_tables(features, labels)
        images, cells = self._chosen(labels.reshape(len(labels), -1), max_samples)
        self._labels = labels.reshape(len(labels), -1)[images, cells].long()
        # Rows of one image stand together; images are counted anew, since some may have no label.
        self._images = images.unique_consecutive(return_inverse=True)[1]
        self._num_classes = int(self._labels.max()) + 1
        chosen = torch.nn.functional.one_hot(self._labels, self._num_classes).double()
        self.chance = self._means_of_images(chosen.T).mean(1).max().item()
        self._check()
        self.folds = self._dealt()[self._images]
        self.rows = [table[images, cells].double() for table in tables]
        self.kernels = torch.stack([_kernel(rows) for rows in self.rows])

    @property
    def num_labels(self) -> int:
        """S, labels that are used."""
        return len(self._labels)

    def per_image(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the share of right cells in each image, (B,), of the layers at these positions together."""
        reader = self._reader(self.kernels[list(positions)].mean(0))
        return self._right(reader, self._labels[None])[0]

    def scores(self) -> LayerScores:
        """Return the scores of each layer alone, and of the best one on shuffled labels."""
        shuffled = torch.stack([self._shuffle() for _ in range(_SHUFFLES)])
        true, false = [], []
        for kernel in self.kernels:
            right = self._right(self._reader(kernel), torch.cat([self._labels[None], shuffled]))
            true.append(right[0])
            false.append(right[1:].mean(1))
        best = torch.stack(false).amax(0)
        return LayerScores(self.layers, torch.stack(true), self.chance, best, self.num_labels)

    def _chosen(self, labels: torch.Tensor, max_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images and cells of the labels that are used, image after image."""
        images = torch.randperm(len(labels), generator=self._random)[:max_samples].sort().values
        share = max(1, max_samples // len(images))
        places = []
        for image in images.tolist():
            there = (labels[image] >= 0).nonzero().flatten()
            some = there[torch.randperm(len(there), generator=self._random)[:share]]
            places.append(torch.stack([torch.full_like(some, image), some]))
        chosen = torch.cat(places, dim=1)
        if rare := list(_lost(labels, chosen)):
            chosen = torch.cat([chosen, *rare], dim=1).unique(dim=1)
        return chosen[0], chosen[1]

    def _check(self) -> None:
        groups = [self._labels[self._images == image].unique() for image in self._images.unique()]
        holders = torch.cat(groups).bincount()
        present = (holders > 0).nonzero().flatten().tolist()
        if len(groups) < NUM_FOLDS or len(present) < 2:
            raise InputError(
                f"{len(groups)} images with labels of {len(present)} classes are too few to learn from some and test "
                f"on others; give at least {NUM_FOLDS} images and two classes."
            )
        if alone := [number for number in present if holders[number] < 2]:
            raise InputError(
                f"classes {alone} stand in one image only, so that no probe can learn and test them; give at least two "
                "images for each class, or leave these out."
            )

    def _dealt(self) -> torch.Tensor:
        """Return the fold of each image, (B,): the images of a class, by an image's first label, go round all folds."""
        first = torch.stack([self._labels[self._images == image][0] for image in self._images.unique()])
        order = torch.randperm(len(first), generator=self._random)
        order = order[first[order].argsort(stable=True)]
        folds = torch.empty(len(first), dtype=torch.long)
        folds[order] = torch.arange(len(first)) % NUM_FOLDS
        return folds

    def _shuffle(self) -> torch.Tensor:
        """Return the labels (S,) with images changing places; an image's labels stay together and in order."""
        groups = self._labels.split(self._images.bincount().tolist())
        order = torch.randperm(len(groups), generator=self._random).tolist()
        return torch.cat([groups[place] for place in order])

    def _reader(self, kernel: torch.Tensor) -> torch.Tensor:
        """Return what makes predictions out of targets, (S, S): each row's weights are of other folds' samples."""
        reader = torch.zeros_like(kernel)
        for fold in range(NUM_FOLDS):
            held, fit = (self.folds == fold).nonzero().flatten(), (self.folds != fold).nonzero().flatten()
            regular = kernel[fit][:, fit]
            regular.diagonal().add_(self.penalty)
            weights = torch.linalg.solve(regular, kernel[fit][:, held]).T
            # Targets lose their mean first and get it back, as in `fit_probe`.
            weights = weights + (1 - weights.sum(1, keepdim=True)) / len(fit)
            reader[held[:, None], fit] = weights
        return reader

    def _right(self, reader: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the share of right cells in each image, (R, B), for R labellings (R, S)."""
        targets = torch.nn.functional.one_hot(labels, self._num_classes).to(reader.dtype)
        predicted = torch.einsum("st,rtk->rsk", reader, targets).argmax(-1)
        return self._means_of_images((predicted == labels).to(reader.dtype))

    def _means_of_images(self, values: torch.Tensor) -> torch.Tensor:
        """Return the means (R, B) over each image's labels of values (R, S)."""
        sizes = self._images.bincount().to(values.dtype)
        return values.new_zeros(len(values), len(sizes)).index_add_(1, self._images, values) / sizes


def _lost(labels: torch.Tensor, chosen: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield an image and a cell, (2, 1), for each class of which the choice has one image or none, until it has two."""
    for number in labels[labels >= 0].unique().tolist():
        held = chosen[0][labels[chosen[0], chosen[1]] == number].unique()
        holders = (labels == number).any(1).nonzero().flatten()
        for image in holders[~torch.isin(holders, held)][: max(0, 2 - len(held))].tolist():
            yield torch.tensor([[image], [int((labels[image] == number).nonzero()[0])]])


def cross_validate_layers(
    features: FeatureMaps, labels: torch.Tensor, *, penalty: float = 1.0, max_samples: int = 1024, seed: int = 0
) -> LayerScores:
    """Return how well each layer predicts labels of images that its probe has not seen; arguments of `LayerProbes`.

    Raises:
        ValueError: as `LayerProbes`.
    """
    return LayerProbes(features, labels, penalty=penalty, max_samples=max_samples, seed=seed).scores()


def bootstrap_means(per_image: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Return the means of (L, B) numbers over images that were drawn anew with replacement: (L, 2000)."""
    count = per_image.shape[1]
    draws = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    return torch.stack([row[draws].mean(1) for row in per_image])


def _as_tables(features: FeatureMaps, labels: torch.Tensor) -> list[torch.Tensor]:
    """Return the maps with one token for each label: (B, 1, C) for labels of images, (B, N, C) for those of cells."""
    cells = {tokens.shape[1] for tokens in features}
    if labels.shape == (features.batch_size,):
        return [tokens.mean(1, keepdim=True) for tokens in features]
    if len(cells) > 1 or labels.shape != (features.batch_size, *cells):
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, and the maps are of {features.batch_size} images with "
            f"{sorted(cells)} cells; give one label an image, (B,), or one a cell of a grid that all layers share, "
            "(B, N)."
        )
    return list(features.maps)


def _kernel(rows: torch.Tensor) -> torch.Tensor:
    """Return the products (S, S) of rows (S, C) whose channels have mean 0 and variance 1; mean diagonal 1."""
    centred = rows - rows.mean(0)
    deviation = centred.std(0, unbiased=False)
    scaled = centred / deviation.clamp_min(1e-8)
    kernel = scaled @ scaled.T
    return kernel / kernel.diagonal().mean().clamp_min(1e-12)
