"""Multi-scale deformable attention: one function, several implementations that tests hold against each other.

Deformable DETR (arXiv:2010.04159), equation 3: every head reads K points per level by bilinear interpolation and sums
them with its own weights. Points outside a map count as zero, coordinates are those of
``torch.nn.functional.grid_sample(..., align_corners=False)``. Shapes follow the legend in ``layerfuse.features``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd.forward_ad import unpack_dual

from layerfuse.errors import InputError
from layerfuse.ops.deformable.gather import gather
from layerfuse.ops.deformable.operator import KERNELS, attend, can_run
from layerfuse.ops.deformable.reference import reference
from layerfuse.registry import unknown_name_message

__all__ = ["IMPLEMENTATIONS", "check_implementation", "deformable_attention"]

_Path = Callable[[torch.Tensor, Sequence[tuple[int, int]], torch.Tensor, torch.Tensor], torch.Tensor]

# Those that are made of torch's own operators, and differentiated by torch.
_PATHS: dict[str, _Path] = {"gather": gather, "reference": reference}

IMPLEMENTATIONS: tuple[str, ...] = ("auto", *sorted({*_PATHS, *KERNELS}))

# What auto takes on a device. On others (xpu, …) it is grid_sample, the better supported; on mps it has no gradient.
# Triton's place is a choice, not a measurement: no path has been timed on a GPU yet. benchmarks/op_choice.py will.
_FASTEST = {"cpu": "native", "cuda": "triton", "meta": "native", "mps": "gather"}


def deformable_attention(
    value: torch.Tensor,
    grids: Sequence[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    """Read every head's sampling points from the value maps and sum them with their weights.

    Half-precision inputs are computed in float32 and float64 ones in float64, on every path. Differentiable once, with
    gradients to ``value``, ``locations`` and ``weights``. Nothing is copied between host and device.

    Args:
        value: (B, S, M, C/M) values of all levels one after another, each row-major over its grid.
        grids: one (H, W) per level, in patches; they may differ from one another.
        locations: (B, Q, M, L, K, 2) sampling points as (x, y), where 0 and 1 are the outer edges of the map; points
            beyond that read zeros.
        weights: (B, Q, M, L, K) weight of each point; used as they are, so normalise them first.
        implementation: ``"reference"`` (``grid_sample`` per level, the oracle), ``"gather"`` (one weighted
            ``embedding_bag`` over all corners of all points; on devices without it plain indexing), ``"native"``
            (C for the CPU, compiled at first use), ``"triton"`` (kernels for CUDA) or ``"auto"``: native on CPU, triton
            on CUDA, gather on mps, reference on others. Gather takes over where there is no C compiler or no Triton,
            the device is another or a GPU too old, or CUDA is to be deterministic.

    Returns:
        (B, Q, C) attended values in the dtype of ``value``.

    Raises:
        ValueError: if the implementation is unknown or the shapes do not fit one another.
    """
    check_implementation(implementation)
    _check_shapes(value, grids, locations, weights)
    path = _choose(implementation, value.device.type)
    precision = torch.float64 if value.dtype == torch.float64 else torch.float32
    locations, weights = locations.to(precision), weights.to(precision)
    if path in KERNELS:
        if not _is_transformed(value, locations, weights):
            return attend(value, grids, locations, weights, path)
        path = "gather"
    return _PATHS[path](value.to(precision), grids, locations, weights).to(value.dtype)


def _choose(implementation: str, device_type: str) -> str:
    """Return the name of the path or kernel to take, where that which was asked for may have to be replaced."""
    if implementation == "auto":
        implementation = _FASTEST.get(device_type, "reference")
    # Nothing is computed on meta: what counts is which tensors are kept for the gradient, the same with every kernel.
    if implementation in _PATHS or device_type == "meta":
        return implementation
    # Kernels there add up in any order. Asked here, torch's compiler notes the answer beside the graph.
    if device_type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return "gather"
    # What can run cannot be asked while a graph is taken; the operator asks it then, each time that it runs.
    if torch.compiler.is_compiling():
        # ONNX knows grid_sample, and no operator of ours.
        if torch.onnx.is_in_onnx_export():
            return "reference"
        return implementation if device_type in KERNELS[implementation].DEVICES else "gather"
    return implementation if can_run(implementation, device_type) else "gather"


def _is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether torch.func or forward differentiation is at work, which an operator of one's own has no part in.

    The former refuses its gradient, the latter would be lost without a word.
    """
    if torch.compiler.is_compiling():
        return False
    is_func_active: bool = torch._C._are_functorch_transforms_active()
    return is_func_active or any(unpack_dual(tensor).tangent is not None for tensor in tensors)


def check_implementation(implementation: str) -> None:
    """Raise InputError, with the known names, for an implementation that ``deformable_attention`` does not have."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            unknown_name_message("implementation", implementation, IMPLEMENTATIONS, of="deformable attention")
        )


def _check_shapes(
    value: torch.Tensor, grids: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> None:
    if value.ndim != 4:
        raise InputError(
            f"value has shape {tuple(value.shape)}; expected (B, S, M, C/M): split the channels into heads first."
        )
    batch_size, num_values, num_heads, _ = value.shape
    expected = sum(height * width for height, width in grids)
    if num_values != expected:
        raise InputError(
            f"value has {num_values} tokens, but the grids {tuple(grids)} have {expected} together; give one (H, W) "
            "per level and concatenate the levels along the token dimension."
        )
    fits = (
        locations.ndim == 6
        and (locations.shape[0], locations.shape[2]) == (batch_size, num_heads)
        and locations.shape[3] == len(grids)
        and locations.shape[5] == 2
    )
    if not fits:
        raise InputError(
            f"locations has shape {tuple(locations.shape)}; expected (B={batch_size}, Q, M={num_heads}, "
            f"L={len(grids)}, K, 2) to fit value and grids."
        )
    if weights.shape != locations.shape[:-1]:
        raise InputError(
            f"weights has shape {tuple(weights.shape)}; expected {tuple(locations.shape[:-1])}, one per location."
        )
