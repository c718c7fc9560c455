"""Weights of a module, compared with its architecture before they are written and when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from layerfuse.errors import InputError
from layerfuse.files import read_safetensors

__all__ = ["fitting_weights", "load_weights", "save_weights", "weight_differences"]

# What torch.compile, DDP and DataParallel, and checkpoint wrappers put between a module and its parameters.
_WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")
# Traces of changes that an architecture cannot be rebuilt with, and what to do about each.
_CHANGES = {
    "base_layer.": "It has adapters: merge them (peft: model.merge_and_unload()) before the backbone is built, or save "
    "them with peft",
    "parametrizations.": "It has parametrizations: fold them in with "
    "torch.nn.utils.parametrize.remove_parametrizations",
    "weight_orig": "It was pruned: make that permanent with torch.nn.utils.prune.remove",
}
_BUFFER_DTYPES = "dtypes of buffers that are not stored"
_MOST_NAMES = 5


def fitting_weights(module: nn.Module, rebuild: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """Return a module's weights, name -> tensor, under the names and with the shapes that its config describes.

    Compiled parts (``_orig_mod``) and data-parallel ones (``module``) are unwrapped. ``rebuild`` builds the
    architecture from the config; it is called on the meta device where it can be.

    Raises:
        ValueError: if a weight is missing, unexpected, of another shape, sharded or without content.
    """
    try:
        with torch.device("meta"):
            expected = rebuild().state_dict()
    except RuntimeError:  # a module of the user's own may need numbers while it is built
        with torch.random.fork_rng(devices=[]):
            expected = rebuild().state_dict()
    strange = [name for name, value in module.state_dict().items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise InputError(
            f"{_listed(strange)} are no tensors, which safetensors cannot store; save state_dict() itself."
        )
    found = {name if name in expected else _unwrapped(name): value for name, value in module.state_dict().items()}
    faults = weight_differences(expected, found)
    if faults:
        text = " ".join(found)
        advice = [words for trace, words in _CHANGES.items() if trace in text]
        raise InputError(
            f"this {type(module).__name__} is not saved, since its config would build another model: {faults}. "
            f"{(advice or ['Its modules were changed after they were built: undo that, or save its state_dict()'])[0]}."
        )
    empty = [name for name, tensor in found.items() if tensor.is_meta]
    if empty:
        raise InputError(f"there is nothing to save: {_listed(empty)} are on the meta device; load weights first.")
    sharded = [name for name, tensor in found.items() if hasattr(tensor, "full_tensor")]
    if sharded:
        raise InputError(
            f"{_listed(sharded)} are shards of weights that lie on several processes; gather them into an unsharded "
            "model first, with torch.distributed.checkpoint.state_dict.get_model_state_dict."
        )
    return found


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def save_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the weights of a module, as `fitting_weights` returns them, to a safetensors file.

    The dtypes of its floating buffers that are no weights stand in the file's metadata. Weights that share memory (tied
    ones) are written once for each name, since safetensors shares nothing.
    """
    kept = {_unwrapped(name) for name in module.state_dict()}
    others = {
        _unwrapped(name): str(buffer.dtype).removeprefix("torch.")
        for name, buffer in module.named_buffers()
        if buffer.is_floating_point() and _unwrapped(name) not in kept
    }
    seen: set[int] = set()
    unshared = {}
    for name, tensor in weights.items():
        place = tensor.untyped_storage().data_ptr()
        unshared[name] = (tensor.clone() if place in seen else tensor).contiguous()
        seen.add(place)
    save_file(unshared, path, metadata={"format": "pt", _BUFFER_DTYPES: json.dumps(others)})


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a file that `save_weights` wrote into a module, in place, each weight in the dtype it was stored in.

    Raises:
        ValueError: if the file is damaged, or its names or shapes are not the module's.
    """
    stored, metadata = read_safetensors(path)
    own = module.state_dict(keep_vars=True)
    faults = weight_differences(own, stored)
    if faults:
        raise InputError(
            f"the weights in {path} do not fit this encoder. {faults}. Check that config and weights come from the "
            "same run."
        )
    # Changed in place, so that weights that are tied stay so.
    for name, tensor in own.items():
        tensor.data = tensor.data.to(stored[name].dtype)
    module.load_state_dict(stored)
    _set_buffer_dtypes(module, stored, metadata)


def _set_buffer_dtypes(module: nn.Module, stored: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Give buffers that no file holds (rotary frequencies, …) the dtype they had when the weights were saved."""
    dtypes = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}
    # Files of layerfuse 0.1 do not say; a model of one dtype was probably moved to it as a whole.
    common = dtypes.pop() if len(dtypes) == 1 else None
    said = {name: getattr(torch, dtype) for name, dtype in json.loads(metadata.get(_BUFFER_DTYPES, "{}")).items()}
    for name, buffer in module.named_buffers():
        dtype = said.get(name, common)
        if name not in stored and dtype is not None and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def weight_differences(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """Return a text of the names and shapes that differ; empty if none do."""
    missing, unexpected = [*(expected.keys() - found.keys())], [*(found.keys() - expected.keys())]
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if not (missing or unexpected or misshapen):
        return ""
    return f"Missing: {_listed(missing)}. Unexpected: {_listed(unexpected)}. Of another shape: {_listed(misshapen)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(sorted(names)[:_MOST_NAMES]) + more if names else "none"
