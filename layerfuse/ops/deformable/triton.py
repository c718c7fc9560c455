"""Deformable attention on CUDA by Triton kernels: forward and backward, without a copy of value, without a wait.

Float32, bfloat16 and float16 are read and written as they are and computed in float32 (float64 in float64). Sizes of
grids are arguments of a launch, so that nothing is copied to the device and a launch can stand in a CUDA graph; the
first launch of a new shape class compiles, so let one run before the capture.

The gradient of value is summed up by atomic additions in float32: it is the same up to rounding from run to run, not
bit for bit. Where ``torch.use_deterministic_algorithms`` asks for more, `can_run` says no and gather takes over.

Triton comes with torch's CUDA builds for Linux, so layerfuse does not depend on it; where it is missing, `can_run` says
no, too. Nothing here has run on a GPU yet: it was run in Triton's interpreter and compiled for Hopper, and sizes of
blocks were chosen by the code that comes out (heads of 1 to 128 channels: no register spilled, no barrier in a loop).
`python -m benchmarks.op_choice --device cuda` holds them, and `auto`'s choice of this path, against others.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["BACKWARD_BLOCKS", "DEVICES", "FORWARD_BLOCKS", "Blocks", "backward", "can_run", "forward"]

DEVICES = frozenset({"cuda"})

# Elements of one image that 32 bits can number; registers and time are saved by not taking 64 where 32 do.
_MOST_ELEMENTS = 2**31 - 1


class Blocks(NamedTuple):
    """What a kernel's program works on: so many numbers, queries times channels, and warps."""

    elements: int
    warps: int


# Eight numbers a lane leave registers for loads.
FORWARD_BLOCKS = Blocks(1024, 4)
# One warp sums over channels without waiting for others.
BACKWARD_BLOCKS = Blocks(256, 1)
_MOST_QUERIES = 128
# Very wide heads have more warps.
_MOST_CHANNELS_A_WARP = 512


def can_run(device_type: str) -> bool:
    """Whether the kernels can run on a type of device here and now, with the determinism that torch is set to."""
    return device_type in DEVICES and _is_supported() and not torch.are_deterministic_algorithms_enabled()


def forward(
    value: torch.Tensor, grids: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the attended values, (B, Q, C), in the dtype of ``value``.

    Arguments are those of ``deformable_attention``, each of a floating point type of its own. ``value`` may have any
    strides but is copied if its channels are not next to one another.
    """
    batch_size, _, num_heads, head_channels = value.shape
    output = value.new_empty(batch_size, locations.shape[1], num_heads * head_channels)
    if output.numel() == 0:
        return output
    value = _with_adjacent_channels(value)
    arguments = _arguments(value, grids, locations)
    tensors = (value, locations.contiguous(), weights.contiguous(), output)
    _launch("forward_kernel", tensors, arguments, FORWARD_BLOCKS)
    return output


def backward(
    grad_output: torch.Tensor,
    value: torch.Tensor,
    grids: Sequence[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
    *,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of value, locations and weights, contiguous, each in the dtype of its tensor.

    Those that are not ``wanted`` are None and are not computed. ``grad_output`` is (B, Q, C).
    """
    precision = torch.float64 if value.dtype == torch.float64 else torch.float32
    grad_value = torch.zeros(value.shape, dtype=precision, device=value.device) if wanted[0] else None
    new = torch.empty if grad_output.numel() else torch.zeros
    grad_locations, grad_weights = (
        new(tensor.shape, dtype=tensor.dtype, device=tensor.device) if asked else None
        for tensor, asked in zip((locations, weights), wanted[1:], strict=True)
    )
    if grad_output.numel() and any(wanted):
        value = _with_adjacent_channels(value)
        arguments = _arguments(value, grids, locations) | {"num_rows": value.shape[1]}
        inputs = (grad_output.contiguous(), value, locations.contiguous(), weights.contiguous())
        tensors = (*inputs, grad_value, grad_locations, grad_weights)
        _launch("backward_kernel", tensors, arguments, BACKWARD_BLOCKS)
    return None if grad_value is None else grad_value.to(value.dtype), grad_locations, grad_weights


@functools.cache
def _is_supported() -> bool:
    """Whether Triton is installed and the GPU one that it compiles for."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def _with_adjacent_channels(value: torch.Tensor) -> torch.Tensor:
    return value if value.stride(-1) == 1 else value.contiguous()


def _arguments(value: torch.Tensor, grids: Sequence[tuple[int, int]], locations: torch.Tensor) -> dict[str, Any]:
    """Return what both kernels are told of sizes, without what a block is."""
    from triton import language as tl

    _, num_values, num_heads, head_channels = value.shape
    _, num_queries, _, num_levels, num_points, _ = locations.shape
    runs = [(height, width, len(list(run))) for (height, width), run in itertools.groupby(map(tuple, grids))]
    per_query = max(head_channels, 2 * num_levels * num_points)
    most = max(num_values * max(value.stride(1), num_heads * head_channels), num_queries * num_heads * per_query)
    return {
        "heights": tuple(height for height, _, _ in runs),
        "widths": tuple(width for _, width, _ in runs),
        "image_stride": value.stride(0),
        "row_stride": value.stride(1),
        "num_queries": num_queries,
        "num_heads": num_heads,
        "num_places": num_levels * num_points,
        "LEVELS": tuple(count for _, _, count in runs),
        "HEAD_STRIDE": value.stride(2),
        "POINTS": num_points,
        "CHANNELS": head_channels,
        "PRECISION": tl.float64 if value.dtype == torch.float64 else tl.float32,
        "INDEX": tl.int32 if most <= _MOST_ELEMENTS else tl.int64,
    }


def _launch(name: str, tensors: tuple[torch.Tensor | None, ...], arguments: dict[str, Any], blocks: Blocks) -> None:
    """Start a kernel for all images, heads and blocks of queries."""
    import triton

    from layerfuse.ops.deformable import _triton_kernels

    value = next(tensor for tensor in tensors if tensor is not None and tensor.ndim == 4)
    block_channels = triton.next_power_of_2(arguments["CHANNELS"])
    num_queries = arguments["num_queries"]
    block_queries = min(_MOST_QUERIES, triton.next_power_of_2(num_queries), max(1, blocks.elements // block_channels))
    programs = value.shape[0] * arguments["num_heads"] * triton.cdiv(num_queries, block_queries)
    with torch.cuda.device_of(value):
        getattr(_triton_kernels, name)[(programs,)](
            *tensors,
            **arguments,
            BLOCK_QUERIES=block_queries,
            BLOCK_CHANNELS=block_channels,
            num_warps=max(blocks.warps, block_channels // _MOST_CHANNELS_A_WARP),
            num_stages=1,
        )
