"""How alike two layers are: linear centred kernel alignment (CKA), and the cosine of their tokens.

CKA: Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv:1905.00414, section 3. With X and
Y the features of the same S samples, (S, C_1) and (S, C_2), each column centred, and F the Frobenius norm:

    CKA(X, Y) = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)

Cosine, as in Figure 1a of the MMFuser paper (arXiv:2410.11829), with x_s and y_s the tokens of a cell s in two layers:

    cos(X, Y) = mean over s of  <x_s, y_s> / (|x_s| |y_s|)

CKA does not see rotations of the channels, so that layers of two backbones can be compared, whatever their widths; the
cosine says whether the same channels say the same, which only layers of one residual stream have in common.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps
from layerfuse.registry import unknown_name_message

__all__ = ["SIMILARITIES", "layer_similarity", "linear_cka", "mean_cosine"]


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the linear CKA, a float64 scalar, of two sets of features, (S, C_1) and (S, C_2), of the same S samples.

    It lies between 0 (nothing linear in common, or one side is constant) and 1 (equal up to rotation, shift and scale),
    and is biased upwards where there are not many more samples than channels.

    Raises:
        ValueError: if the two are not matrices with the same number of rows, at least two.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[0] or first.shape[0] < 2:
        raise InputError(
            f"linear_cka got shapes {tuple(first.shape)} and {tuple(second.shape)}; expected (S, C_1) and (S, C_2) "
            "with the same S of at least 2: flatten batch and tokens into one dimension first."
        )
    # float64: the centred products cancel, and the numbers are small enough to afford it.
    centred_1 = first.double() - first.double().mean(0)
    centred_2 = second.double() - second.double().mean(0)
    shared = (centred_1.T @ centred_2).square().sum()
    own = torch.linalg.matrix_norm(centred_1.T @ centred_1) * torch.linalg.matrix_norm(centred_2.T @ centred_2)
    return torch.where(own > 0, shared / own.clamp_min(torch.finfo(own.dtype).tiny), torch.zeros_like(own))


def mean_cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine, a float64 scalar in [-1, 1], of the rows of two sets of features, both (S, C).

    Raises:
        ValueError: if the two are not matrices of one shape with at least one row.
    """
    if first.ndim != 2 or first.shape != second.shape or len(first) == 0:
        raise InputError(
            f"mean_cosine got shapes {tuple(first.shape)} and {tuple(second.shape)}; expected (S, C) twice: a cosine "
            "compares channel with channel. Layers of other widths are compared by linear_cka (measure='cka')."
        )
    return F.cosine_similarity(first.double(), second.double(), dim=1).mean()


SIMILARITIES = {"cka": linear_cka, "cosine": mean_cosine}
"""Measures that `layer_similarity` takes, by name."""


def layer_similarity(features: FeatureMaps, others: FeatureMaps | None = None, *, measure: str = "cka") -> torch.Tensor:
    """Return how alike every two layers are, over all patch tokens of all images: (L, L') float64.

    Args:
        features: L maps.
        others: L' maps of the same images on the same grid, such as another backbone's; if None, ``features``
            themselves, and the result is symmetric.
        measure: ``"cka"`` or ``"cosine"``, which needs one width; see the equations of this module.

    Raises:
        ValueError: if the maps have different grids or numbers of images, or there is no such measure.
    """
    if measure not in tuple(SIMILARITIES):
        raise InputError(unknown_name_message("measure", measure, SIMILARITIES))
    columns = features if others is None else others
    grids = {*features.grids, *columns.grids}
    if len(grids) > 1 or features.batch_size != columns.batch_size:
        raise InputError(
            f"layers {features.layers} and {columns.layers} have grids {sorted(grids)} and {features.batch_size} and "
            f"{columns.batch_size} images; layer similarity compares token with token of the same images: tap layers "
            "of one grid, or bring them to one with FeatureMaps.resample."
        )
    tokens, against = ([feature_map.flatten(0, 1) for feature_map in maps] for maps in (features, columns))
    similarity = torch.empty(len(tokens), len(against), dtype=torch.float64)
    for i, row in enumerate(tokens):
        for j, column in enumerate(against):
            mirrored = others is None and j < i
            similarity[i, j] = similarity[j, i] if mirrored else SIMILARITIES[measure](row, column)
    return similarity
