"""Deformable attention as an operator of torch, with its gradient: what compile, export and checkpoints see as one.

A kernel is a module with what `Kernel` names; the table below names all of them. Kernels are called with what
``deformable_attention`` has checked: ``value`` of any floating point type, ``locations`` and ``weights`` in float64
where ``value`` is, else in float32. Where a kernel cannot run (no compiler, another device), `gather` and the gradient
of `reference` take its place, so that a program that was exported elsewhere runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from layerfuse.errors import InputError
from layerfuse.ops.deformable import native, triton
from layerfuse.ops.deformable.gather import gather
from layerfuse.ops.deformable.reference import reference_gradients

__all__ = ["KERNELS", "Kernel", "attend", "can_run"]

Grids = Sequence[tuple[int, int]]
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Kernel(Protocol):
    """What the module of an implementation has to have. Shapes are those of ``deformable_attention``."""

    DEVICES: frozenset[str]
    """Types of the devices that it is written for."""

    def can_run(self, device_type: str) -> bool:
        """Whether tensors on a device of one of these types can be computed here; asked often, so quick to tell."""

    def forward(
        self, value: torch.Tensor, grids: Grids, locations: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the attended values, (B, Q, C), contiguous, in the dtype of ``value``."""

    def backward(
        self,
        grad_output: torch.Tensor,
        value: torch.Tensor,
        grids: Grids,
        locations: torch.Tensor,
        weights: torch.Tensor,
        *,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        """Return the gradients of value, locations and weights, contiguous, each in the dtype of its tensor.

        Those that are not ``wanted`` are None, and cost nothing. ``grad_output`` (B, Q, C) may have any strides.
        """


KERNELS: dict[str, Kernel] = {"native": native, "triton": triton}


def can_run(implementation: str, device_type: str) -> bool:
    """Whether a kernel of this name computes tensors on devices of this type here."""
    kernel = KERNELS.get(implementation)
    return kernel is not None and device_type in kernel.DEVICES and kernel.can_run(device_type)


def attend(
    value: torch.Tensor, grids: Grids, locations: torch.Tensor, weights: torch.Tensor, implementation: str
) -> torch.Tensor:
    """Return the attention, (B, Q, C), through the operator ``layerfuse::deformable_attention``."""
    flat = [size for grid in grids for size in grid]
    output: torch.Tensor = torch.ops.layerfuse.deformable_attention(value, locations, weights, flat, implementation)
    return output


def _forward(
    value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor, flat: list[int], implementation: str
) -> torch.Tensor:
    grids = _grids(flat)
    if can_run(implementation, value.device.type):
        return KERNELS[implementation].forward(value, grids, locations, weights)
    return gather(value.to(locations.dtype), grids, locations, weights).to(value.dtype)


def _backward(
    grad_output: torch.Tensor,
    value: torch.Tensor,
    locations: torch.Tensor,
    weights: torch.Tensor,
    flat: list[int],
    implementation: str,
    wanted: list[bool],
) -> tuple[torch.Tensor, ...]:
    grids, for_value, for_locations, for_weights = _grids(flat), *wanted
    backward = reference_gradients
    if can_run(implementation, value.device.type):
        backward = KERNELS[implementation].backward
    gradients = backward(grad_output, value, grids, locations, weights, wanted=(for_value, for_locations, for_weights))
    # An operator returns tensors only: what nobody asked for is empty.
    return tuple(value.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_forward(
    value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor, flat: list[int], implementation: str
) -> torch.Tensor:
    batch_size, _, num_heads, head_channels = value.shape
    return value.new_empty(batch_size, locations.shape[1], num_heads * head_channels)


def _fake_backward(
    grad_output: torch.Tensor,
    value: torch.Tensor,
    locations: torch.Tensor,
    weights: torch.Tensor,
    flat: list[int],
    implementation: str,
    wanted: list[bool],
) -> tuple[torch.Tensor, ...]:
    tensors = (value, locations, weights)
    return tuple(
        tensor.new_empty(tensor.shape) if asked else value.new_empty(0)
        for tensor, asked in zip(tensors, wanted, strict=True)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    value, locations, weights, ctx.flat, ctx.implementation = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.layerfuse.deformable_attention_backward(
        grad_output, *ctx.saved_tensors, ctx.flat, ctx.implementation, wanted
    )
    asked = (gradient if asked else None for gradient, asked in zip(gradients, wanted, strict=True))
    return (*asked, None, None)


def _refuse(ctx: Any, *gradients: torch.Tensor) -> None:
    raise InputError(
        "deformable attention was asked for the gradient of its gradient, which none of its implementations has; "
        "it is differentiable once."
    )


def _grids(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


_INPUTS = "Tensor value, Tensor locations, Tensor weights, SymInt[] grids, str implementation"
# Not torch.library.custom_op: its operators load torch's compiler, more than a second, when they first run.
torch.library.define("layerfuse::deformable_attention", f"({_INPUTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    "layerfuse::deformable_attention_backward",
    f"(Tensor grad_output, {_INPUTS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("layerfuse::deformable_attention", "default", _forward)
torch.library.impl("layerfuse::deformable_attention_backward", "default", _backward)
torch.library.register_fake("layerfuse::deformable_attention", _fake_forward)
torch.library.register_fake("layerfuse::deformable_attention_backward", _fake_backward)
torch.library.register_autograd("layerfuse::deformable_attention", _differentiate, setup_context=_keep)
torch.library.register_autograd("layerfuse::deformable_attention_backward", _refuse)
