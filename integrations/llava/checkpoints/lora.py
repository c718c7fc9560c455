"""Files of LoRA adapters in PEFT's own format: `PeftModel.from_pretrained` and `model.load_adapter` read them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from integrations.llava.modeling import FILE_PREFIX, inject_lora, lora_config, lora_weights
from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import atomic_folder

from .tensors import StoredTensor, check_fit, read_json, stored_tensors

__all__ = ["ADAPTER_CONFIG", "load_lora", "merged_tensors", "save_lora"]

ADAPTER_CONFIG = "adapter_config.json"
# Today's PEFT writes the first, earlier versions the other.
_WEIGHTS, _OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
# Settings under which a weight's change is something else than scale * B @ A.
_VARIANTS = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication")


def save_lora(model: nn.Module, folder: str | Path) -> Path:
    """Write a model's adapters as `adapter_config.json` and `adapter_model.safetensors` into a folder.

    Returns:
        The folder.

    Raises:
        ValueError: if the model has no adapters.
    """
    config = copy.copy(lora_config(model))
    config.inference_mode = True
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in lora_weights(model).items()}
    with atomic_folder(folder) as scratch:
        save_file(weights, scratch / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(scratch))
    return Path(folder)


def load_lora(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> None:
    """Put adapters that `save_lora` or PEFT wrote into the model they were trained on, or its unquantised twin.

    Raises:
        FileNotFoundError: if the folder holds no adapters.
        ValueError: if they do not fit the model, or it has adapters already; all names are listed.
        ImportError: if peft is not installed.
    """
    stored = _stored_adapter(Path(folder))
    inject_lora(model, Path(folder), trainable=trainable)
    adapters = lora_weights(model)
    check_fit(
        adapters,
        stored,
        fault=f"the adapters in {folder} do not fit this model",
        advice="Load them into the model that they were trained on",
    )
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(stored[name].read())


def merged_tensors(tensors: Mapping[str, StoredTensor], folder: str | Path) -> dict[str, StoredTensor]:
    """All tensors of a model, under our names; those with an adapter in the folder are merged when they are read.

    Raises:
        FileNotFoundError: if the folder holds no adapters.
        ValueError: if they are of a kind other than plain LoRA, or do not fit the weights.
    """
    stored = _stored_adapter(Path(folder))
    config = read_json(Path(folder) / ADAPTER_CONFIG)
    variants = [name for name in _VARIANTS if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or variants:
        raise InputError(
            f"{folder} holds adapters that cannot be merged tensor by tensor (peft_type {config.get('peft_type')!r}, "
            f"bias {config.get('bias')!r}, {', '.join(variants) or 'no variants'}); merge them with peft, then convert."
        )
    merged, faults = dict(tensors), []
    for name in sorted({name.rpartition(".lora_")[0] for name in stored}):
        down, up = (stored.get(f"{name}.lora_{side}.weight") for side in "AB")
        ours = f"{name.removeprefix(FILE_PREFIX)}.weight"
        if ours not in merged or down is None or up is None or merged[ours].shape != (up.shape[0], down.shape[1]):
            faults.append(ours)
            continue
        rank = down.shape[0]
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        merged[ours] = merged[ours].then(partial(_add, down, up, scale))
    if faults:
        raise InputError(f"the adapters in {folder} do not fit these weights of the model: {', '.join(faults)}.")
    return merged


def _add(down: StoredTensor, up: StoredTensor, scale: float, weight: torch.Tensor) -> torch.Tensor:
    change = (up.read().float() @ down.read().float()) * scale
    return (weight.float() + change).to(weight.dtype)


def _stored_adapter(folder: Path) -> dict[str, StoredTensor]:
    found = [folder / name for name in (_WEIGHTS, _OLD_WEIGHTS) if (folder / name).is_file()]
    if not (folder / ADAPTER_CONFIG).is_file() or not found:
        raise MissingFileError(
            f"{folder} holds no adapters; expected {ADAPTER_CONFIG} and {_WEIGHTS} (or {_OLD_WEIGHTS}), as PEFT writes "
            "them."
        )
    return stored_tensors(found[0])
