"""How alike two layers are: linear centred kernel alignment (CKA).

Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv:1905.00414, section 3 (linear case).
"""

from __future__ import annotations

import torch

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps

__all__ = ["layer_similarity", "linear_cka"]


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


def layer_similarity(features: FeatureMaps) -> torch.Tensor:
    """Return the linear CKA of every two tapped layers, over all patch tokens of all images: (L, L) float64, symmetric.

    Raises:
        ValueError: if the maps have different grids.
    """
    if len(set(features.grids)) > 1:
        raise InputError(
            f"layers {features.layers} have grids {features.grids}; layer similarity compares token with token: "
            "tap layers of one grid."
        )
    rows = [feature_map.flatten(0, 1) for feature_map in features]
    similarity = torch.ones(len(rows), len(rows), dtype=torch.float64)
    for i, first in enumerate(rows):
        for j in range(i):
            similarity[i, j] = similarity[j, i] = linear_cka(first, rows[j])
    return similarity
