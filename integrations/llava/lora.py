"""LoRA (arXiv:2106.09685) and QLoRA (arXiv:2305.14314) of the language model, through peft.

Adapters are put into the model in place, so that its class, its names and everything that is built on them stay. What
`save_lora` writes is PEFT's own format: `PeftModel.from_pretrained` and `model.load_adapter` read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from layerfuse.errors import InputError, MissingFileError, MissingPackageError
from layerfuse.files import atomic_folder

from .config import LoraConfig
from .weight_files import StoredTensor, check_fit, read_json, stored_tensors

__all__ = ["add_lora", "load_lora", "merge_lora", "merged_tensors", "save_lora"]

_LANGUAGE_MODEL = "model.language_model."
_ADAPTER = "default"
# What PEFT puts in front of a module's name in its files.
_FILE_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings under which a weight's change is something else than scale * B @ A.
_VARIANTS = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication")


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Put new adapters into the language model; they start as zero, so the model computes what it did before.

    The language model's own weights are frozen and the adapters learn, in float32; other parts stay as they are.

    Args:
        model: the whole model, changed in place.
        config: rank, scale, dropout and names of the linear layers.

    Raises:
        ValueError: if the rank is below 1, the model has adapters already, no layer has one of the names, or 4-bit
            weights were already used to answer on a CPU.
        ImportError: if peft is not installed.
    """
    if config.rank < 1:
        raise InputError(f"lora.rank={config.rank} is too small for adapters; give at least 1, such as 128.")
    _refuse_adapted(model)
    linear = {name.rpartition(".")[2] for name, module in _language_model(model) if isinstance(module, nn.Linear)}
    absent = sorted(set(config.target_modules) - linear)
    if absent or not config.target_modules:
        raise InputError(
            f"lora.target_modules: the language model has no linear layers called {', '.join(absent) or '(none given)'}"
            f"; it has {', '.join(sorted(linear))}."
        )
    _refuse_repacked(model)
    names = "|".join(map(re.escape, config.target_modules))
    _inject(
        model,
        _peft().LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            # Anchored, since a vision model's layers may have the same names.
            target_modules=rf"{re.escape(_LANGUAGE_MODEL)}.*\.(?:{names})",
        ),
    )


def save_lora(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters in PEFT's format.

    Args:
        model: with adapters.
        folder: `adapter_config.json` and `adapter_model.safetensors` go there.

    Returns:
        The folder.

    Raises:
        ValueError: if the model has no adapters.
    """
    config = _config_of(model)
    weights = {_file_name(name): parameter.detach().cpu().contiguous() for name, parameter in _adapters(model).items()}
    learning, config.inference_mode = config.inference_mode, True
    with atomic_folder(folder) as scratch:
        save_file(weights, scratch / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(scratch))
    config.inference_mode = learning
    return Path(folder)


def load_lora(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> None:
    """Put saved adapters into the language model.

    Args:
        model: the model they were trained on, or its unquantised twin; changed in place.
        folder: as `save_lora` or PEFT wrote it.
        trainable: whether they go on learning.

    Raises:
        FileNotFoundError: if the folder holds no adapters.
        ValueError: if they do not fit the model, or it has adapters already; all names are listed.
        ImportError: if peft is not installed.
    """
    stored = _stored_adapter(Path(folder))
    config = _peft().LoraConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    _inject(model, config)
    adapters = {_file_name(name): parameter for name, parameter in _adapters(model).items()}
    check_fit(
        adapters,
        stored,
        fault=f"the adapters in {folder} do not fit this model",
        advice="Load them into the model that they were trained on",
    )
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(stored[name].read())


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights they belong to, and take them out: a plain model is left.

    Args:
        model: with adapters, changed in place.

    Raises:
        ValueError: if the model has no adapters, or its weights are quantised: adding to 4 or 8 bits would round twice.
    """
    _config_of(model)
    layers = [(name, module) for name, module in model.named_modules() if _is_adapted(module)]
    quantized = [name for name, layer in layers if not layer.get_base_layer().weight.is_floating_point()]
    if quantized:
        raise InputError(
            f"{len(quantized)} layers with adapters are quantised ({quantized[0]}, …), and merging into them would "
            "round again. Save the adapters, load the model unquantised, load the adapters, and merge there."
        )
    for name, layer in layers:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config


def merged_tensors(tensors: Mapping[str, StoredTensor], folder: str | Path) -> dict[str, StoredTensor]:
    """Merge saved adapters into stored weights, one at a time, as they are read.

    Args:
        tensors: a whole model's, under our names.
        folder: of the adapters, as `save_lora` wrote it.

    Returns:
        All tensors; those with an adapter are merged when they are read.

    Raises:
        FileNotFoundError: if the folder holds no adapters.
        ValueError: if they are of a kind other than plain LoRA, or do not fit the weights.
    """
    stored = _stored_adapter(Path(folder))
    config = read_json(Path(folder) / _CONFIG)
    variants = [name for name in _VARIANTS if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or variants:
        raise InputError(
            f"{folder} holds adapters that cannot be merged tensor by tensor (peft_type {config.get('peft_type')!r}, "
            f"bias {config.get('bias')!r}, {', '.join(variants) or 'no variants'}); merge them with peft, then convert."
        )
    merged = dict(tensors)
    faults = []
    names = sorted({name.rpartition(".lora_")[0] for name in stored})
    for name in names:
        down, up = (stored.get(f"{name}.lora_{side}.weight") for side in "AB")
        ours = f"{name.removeprefix(_FILE_PREFIX)}.weight"
        if ours not in merged or down is None or up is None or merged[ours].shape != (up.shape[0], down.shape[1]):
            faults.append(ours)
            continue
        rank = down.shape[0]
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        merged[ours] = merged[ours].then(_adder(down, up, scale))
    if faults:
        raise InputError(f"the adapters in {folder} do not fit these weights of the model: {', '.join(faults)}.")
    return merged


def _adder(down: StoredTensor, up: StoredTensor, scale: float) -> Any:
    def add(weight: torch.Tensor) -> torch.Tensor:
        change = (up.read().float() @ down.read().float()) * scale
        return (weight.float() + change).to(weight.dtype)

    return add


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            "LoRA needs the package peft; install it with `pip install 'layerfuse[lora]'`."
        ) from error
    module: ModuleType = peft
    return module


def _inject(model: nn.Module, config: Any) -> None:
    _refuse_adapted(model)
    # peft freezes everything but the adapters; of other parts that is not its decision.
    learning = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith((_LANGUAGE_MODEL, "lm_head."))
    ]
    _peft().inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for parameter in learning:
        parameter.requires_grad_(True)
    for parameter in _adapters(model).values():
        parameter.data = parameter.data.float()


def _refuse_adapted(model: nn.Module) -> None:
    if getattr(model, "peft_config", None):
        raise InputError("the model has adapters already; merge them (merge_lora) or load the model anew.")


def _refuse_repacked(model: nn.Module) -> None:
    """Bitsandbytes reorders 4-bit weights on the CPU when they first answer, and gradients through them are wrong."""
    for name, parameter in model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                f"{name} was repacked for inference when the model first answered on this CPU, and bitsandbytes "
                "computes wrong gradients through it; load the quantised model anew and train it before it answers."
            )


def _language_model(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if name.startswith(_LANGUAGE_MODEL)]


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def _config_of(model: nn.Module) -> Any:
    configs: Any = getattr(model, "peft_config", None)
    if not configs:
        raise InputError("the model has no adapters; add some (add_lora) or load them (load_lora) first.")
    return configs[_ADAPTER]


def _file_name(name: str) -> str:
    return _FILE_PREFIX + name.replace(f".{_ADAPTER}.", ".")


def _stored_adapter(folder: Path) -> dict[str, StoredTensor]:
    if not (folder / _CONFIG).is_file() or not (folder / _WEIGHTS).is_file():
        raise MissingFileError(f"{folder} holds no adapters; expected {_CONFIG} and {_WEIGHTS}, as PEFT writes them.")
    return stored_tensors(folder / _WEIGHTS)
