"""The record of a layer in one call, and the checks that refuse a record whose tensor may not be the layer's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from layerfuse.errors import TapError

__all__ = ["TappedLayer", "check_gradients", "check_passed_on", "check_runs", "check_unchanged", "record_layer"]


class TappedLayer(NamedTuple):
    """The record of one layer in one call.

    Attributes:
        kept: (B, P + N, C), the tensor that is handed over.
        seen: the same before it was copied, if it was.
        version: of ``kept`` when it was tapped, or None of a copy, which nobody else can change.
        lost_graph: it has parameters or an input that want a gradient, but ran with gradients turned off, though they
            were on when the call began.
    """

    kept: torch.Tensor
    seen: torch.Tensor
    version: int | None
    lost_graph: bool


def record_layer(
    layer: int, value: Any, module: nn.Module, args: tuple[Any, ...], *, copied: bool, wanted: bool, grad_at_start: bool
) -> TappedLayer:
    """Return the record of a layer, made from the output of its block, or from the input of block 1 for layer 0.

    ``copied``: hand over a copy. ``wanted``: it is to be handed over; else it is only compared with the input of the
    next block. Raises TapError if ``value`` is no tensor (B, P + N, C), nor a tuple that begins with one.
    """
    seen = _leading_tensor(value)
    if seen is None:
        raise TapError(
            f"layer {layer} is a {type(value).__name__} where hidden states were expected: "
            f"{type(module).__name__} must take and return a tensor (B, P + N, C), or a tuple that begins with one."
        )
    if not wanted:
        return TappedLayer(seen, seen, None, lost_graph=False)
    # Inference tensors and traced ones have no version that could tell a later change.
    copied = copied or torch.compiler.is_compiling() or seen.is_inference()
    kept = seen.clone() if copied else seen
    lost_graph = grad_at_start and not torch.is_grad_enabled() and _wants_grad(module, args)
    return TappedLayer(kept, seen, None if copied else kept._version, lost_graph)


def check_runs(layers: Sequence[int], stored: Mapping[int, TappedLayer], repeated: set[int]) -> None:
    """Raise TapError unless every layer asked for ran once, after those of lower numbers.

    ``stored`` has the layers in the order in which they ran, ``repeated`` those that ran again.
    """
    missing = [layer for layer in layers if layer not in stored]
    if missing:
        raise TapError(
            f"tapped layers {missing} did not run; asked for {tuple(layers)}. Possible reasons: the model did not run, "
            "or ended before them; their blocks were left out in this call (LayerDrop: use eval mode); they are called "
            "as block.forward(x) rather than block(x); they ran in another thread (DataParallel inside) or in code "
            "compiled before the taps were set; or another backbone made from this model cut them off."
        )
    if list(stored) != sorted(stored):
        raise TapError(
            f"layers ran in the order {', '.join(map(str, stored))}, but are counted in the order of the block list, "
            "so their numbers would not say how deep they are. Give the model a list in the order in which it runs."
        )
    twice = [layer for layer in layers if layer in repeated]
    if twice:
        raise TapError(
            f"tapped layers {twice} ran more than once in one call, so there is no one answer to what they put out. "
            "Run the model once for each call, on one batch; a model that loops over its blocks cannot be tapped."
        )


def check_passed_on(layer: int, tapped: TappedLayer, arguments: tuple[Any, ...]) -> None:
    """Raise TapError for a layer whose output is none of the arguments of the next block."""
    received = [tensor for tensor in map(_leading_tensor, arguments) if tensor is not None]
    # The same values elsewhere (another device, another dtype, a view that a wrapper made) are no change.
    if not any(tensor is tapped.seen for tensor in received) and not any(
        _holds(tensor, tapped.seen) for tensor in received
    ):
        raise TapError(
            f"what block {layer} puts out is not what block {layer + 1} receives: the model, or a hook before block "
            f"{layer + 1}, changes it in between (a residual sum outside the blocks, prompts or positions added before "
            f"each block), so there is no one answer to what layer {layer} is. Make that part of the blocks, or tap "
            "layers between which nothing happens."
        )


def check_unchanged(tapped: Mapping[int, TappedLayer]) -> None:
    """Raise TapError for layers whose tensor was changed in place after it was tapped."""
    changed = [
        layer
        for layer, record in tapped.items()
        if record.version is not None and record.version != record.kept._version
    ]
    if changed:
        raise TapError(
            f"what layers {changed} put out was changed in place afterwards (by a later block, a hook, or code after "
            "the blocks), so the tapped tensors no longer hold what the layers gave. Set copy_maps=True to copy them "
            "when they are tapped, or make the change out of place (x = x + y rather than x += y)."
        )


def check_gradients(tapped: Mapping[int, TappedLayer]) -> None:
    """Raise TapError for layers that lost their graph on the way, while others have one."""
    with_graph = sorted(layer for layer, record in tapped.items() if record.seen.requires_grad)
    # Layers before the first one that is trained have no graph either, and never had one. A copy made inside a
    # reentrant checkpoint has none, though its original is given one afterwards.
    lost = [
        layer
        for layer, record in tapped.items()
        if with_graph and not record.kept.requires_grad and (layer >= with_graph[0] or record.lost_graph)
    ]
    if lost:
        raise TapError(
            f"what was tapped of layers {lost} has no gradient, while the model goes on with hidden states that have "
            f"one (layers {with_graph}): blocks ran with gradients turned off (checkpoints with use_reentrant=True, "
            "torch.no_grad), or their output was detached. Checkpoint with use_reentrant=False, or run the whole model "
            "under torch.no_grad()."
        )


def _leading_tensor(value: Any) -> torch.Tensor | None:
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return first if isinstance(first, torch.Tensor) else None


def _wants_grad(module: nn.Module, args: tuple[Any, ...]) -> bool:
    tensors = [tensor for tensor in map(_leading_tensor, args) if tensor is not None]
    return any(tensor.requires_grad for tensor in (*tensors, *module.parameters()))


def _holds(tensor: torch.Tensor, seen: torch.Tensor) -> bool:
    if tensor.shape != seen.shape or not tensor.is_floating_point():
        return False
    if tensor.data_ptr() == seen.data_ptr():
        return True
    return torch.allclose(tensor, seen.to(tensor), rtol=0, atol=0, equal_nan=True)
