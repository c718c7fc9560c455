"""Deformable attention on the CPU by a C function of our own, `native.c`, compiled at first use where that can be.

Value is read where it lies, in its own precision; beside the results there is only memory for one head's maps in each
thread. Threads are as many as torch has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from layerfuse.ops.deformable.compiled import compiled_library

__all__ = ["DEVICES", "backward", "can_run", "forward"]

DEVICES = frozenset({"cpu"})

Grids = Sequence[tuple[int, int]]

_SOURCE = Path(__file__).with_name("native.c")
_REALS = {torch.float32: "float", torch.float64: "double"}
# Multiply-adds below which another thread costs more than it saves, about a tenth of a millisecond.
_LEAST_WORK = 2**22


class _Call(ctypes.Structure):
    """`Call` of native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("value", "grad_output", "locations", "weights", "output")),
        *((name, ctypes.c_void_p) for name in ("grad_locations", "grad_weights", "memory", "grids")),
        *((name, ctypes.c_int64) for name in ("per_thread", "B", "S", "M", "D", "Q", "L", "K")),
        *((name, ctypes.c_int64) for name in ("parts", "is_bfloat16", "is_backward")),
    )


def can_run(device_type: str) -> bool:
    """Whether there is a library, or one could be made."""
    return _library(torch.float32) is not None


def forward(value: torch.Tensor, grids: Grids, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the attended values, (B, Q, C), in the dtype of ``value``."""
    if value.dtype == torch.float16:
        return forward(value.float(), grids, locations, weights).half()
    batch_size, _, num_heads, head_channels = value.shape
    output = value.new_empty(batch_size, locations.shape[1], num_heads * head_channels)
    _run(grids, {"value": value, "locations": locations, "weights": weights}, {"output": output})
    return output


def backward(
    grad_output: torch.Tensor,
    value: torch.Tensor,
    grids: Grids,
    locations: torch.Tensor,
    weights: torch.Tensor,
    *,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of value, locations and weights that are ``wanted``; the same ones each time."""
    if value.dtype == torch.float16:
        of_value, of_locations, of_weights = backward(
            grad_output.float(), value.float(), grids, locations, weights, wanted=wanted
        )
        return None if of_value is None else of_value.half(), of_locations, of_weights
    tensors = {"output": value, "grad_locations": locations, "grad_weights": weights}
    results = {
        name: tensor.new_empty(tensor.shape)
        for (name, tensor), asked in zip(tensors.items(), wanted, strict=True)
        if asked
    }
    given = {"value": value, "grad_output": grad_output, "locations": locations, "weights": weights}
    _run(grids, given, results)
    return results.get("output"), results.get("grad_locations"), results.get("grad_weights")


def _run(grids: Grids, given: dict[str, torch.Tensor], results: dict[str, torch.Tensor]) -> None:
    """Fill the tensors of ``results``, which are contiguous, from those that are given."""
    given = {name: tensor.contiguous() for name, tensor in given.items()}
    value, locations = given["value"], given["locations"]
    batch_size, num_values, num_heads, head_channels = value.shape
    _, num_queries, _, num_levels, num_points, _ = locations.shape
    sizes = (ctypes.c_int64 * (2 * num_levels))(*(size for grid in grids for size in grid))
    call = _Call(
        **{name: tensor.data_ptr() for name, tensor in (given | results).items()},
        grids=ctypes.addressof(sizes),
        B=batch_size,
        S=num_values,
        M=num_heads,
        D=head_channels,
        Q=num_queries,
        L=num_levels,
        K=num_points,
        is_bfloat16=value.dtype == torch.bfloat16,
        is_backward="grad_output" in given,
    )
    pairs = batch_size * num_heads
    work = pairs * num_queries * num_levels * num_points * head_channels * 4
    threads = max(1, min(torch.get_num_threads(), work // _LEAST_WORK))
    # Heads whose queries come in parts add to one gradient.
    call.parts = 1 if call.is_backward else max(1, min(-(-threads // max(1, pairs)), num_queries))
    threads = max(1, min(threads, pairs * call.parts))
    library = _library(locations.dtype)
    assert library is not None
    call.per_thread = library.memory_of_a_thread(ctypes.byref(call))
    memory = locations.new_empty(threads * call.per_thread)
    call.memory = memory.data_ptr()
    library.run(ctypes.byref(call), threads)


@cache
def _library(precision: torch.dtype) -> ctypes.CDLL | None:
    library = compiled_library(_SOURCE, [f"REAL={_REALS[precision]}"])
    if library is not None:
        library.memory_of_a_thread.argtypes = (ctypes.POINTER(_Call),)
        library.memory_of_a_thread.restype = ctypes.c_int64
        library.run.argtypes = (ctypes.POINTER(_Call), ctypes.c_int64)
        library.run.restype = None
    return library
