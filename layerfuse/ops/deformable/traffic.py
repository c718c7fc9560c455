"""The fewest bytes that deformable attention moves: over a device's bandwidth, the time that no kernel beats."""

from __future__ import annotations

import torch

__all__ = ["least_traffic"]


def least_traffic(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> tuple[int, int]:
    """Return the bytes that forward and backward have to move between memory and chip at least.

    Every input is read once and every result written once: forward reads ``value`` (B, S, M, C/M), ``locations``
    (B, Q, M, L, K, 2) and ``weights`` (B, Q, M, L, K) and writes the output (B, Q, C) in the type of ``value``;
    backward reads the output's gradient and the three again, and writes a gradient of each. Sums in a wider type
    that a kernel writes on the way are its own cost, and not counted. Tensors may be on ``meta``.
    """
    inputs = value.nbytes + locations.nbytes + weights.nbytes
    output = locations.shape[0] * locations.shape[1] * value.shape[2] * value.shape[3] * value.element_size()
    return inputs + output, 2 * inputs + output
