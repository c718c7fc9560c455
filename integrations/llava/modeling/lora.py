"""LoRA (arXiv:2106.09685) and QLoRA (arXiv:2305.14314) of the language model, put in place through peft."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from integrations.llava.config import LoraConfig
from layerfuse.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["FILE_PREFIX", "add_lora", "inject_lora", "lora_config", "lora_weights", "merge_lora"]

_LANGUAGE_MODEL = "model.language_model."
FILE_PREFIX = "base_model.model."
"""Text that PEFT puts in front of a module's name in its files."""
# Name of the one set of adapters, as PEFT writes it into parameter names but not into files.
_ADAPTER = "default"


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Put new adapters into the language model; they start as zero, so the model computes what it did before.

    The language model's own weights are frozen and the adapters learn, in float32; other parts stay as they are.

    Raises:
        ValueError: if the rank is below 1, the model has adapters already, no layer has one of the names, or 4-bit
            weights were already used to answer on a CPU.
        ImportError: if peft is not installed.
    """
    if config.rank < 1:
        raise InputError(f"lora.rank={config.rank} is too small for adapters; give at least 1, such as 128.")
    _refuse_adapted(model)
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name.startswith(_LANGUAGE_MODEL) and isinstance(module, nn.Linear)
    }
    absent = sorted(set(config.target_modules) - linear)
    if absent or not config.target_modules:
        raise InputError(
            f"lora.target_modules: the language model has no linear layers called {', '.join(absent) or '(none given)'}"
            f"; it has {', '.join(sorted(linear))}."
        )
    _refuse_repacked(model)
    names = "|".join(map(re.escape, config.target_modules))
    described = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        # Anchored, since a vision model's layers may have the same names.
        "target_modules": rf"{re.escape(_LANGUAGE_MODEL)}.*\.(?:{names})",
    }
    inject_lora(model, described)


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights they belong to, and take them out: a plain model is left, in place.

    Raises:
        ValueError: if the model has no adapters, or its weights are quantised: adding to 4 or 8 bits would round twice.
    """
    lora_config(model)
    adapted = ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))
    layers: list[tuple[str, Any]] = [(name, module) for name, module in adapted if hasattr(module, "get_base_layer")]
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


def inject_lora(
    model: nn.Module, config: PeftConfig | Mapping[str, Any] | str | Path, *, trainable: bool | None = None
) -> None:
    """Put adapters, by a `peft.LoraConfig`, its fields or the folder of one, into the model in place, in float32.

    Args:
        model: without adapters.
        config: copied.
        trainable: whether the adapters learn; None for what a `peft.LoraConfig` says, and otherwise yes.

    Raises:
        ValueError: if the model has adapters already.
        ImportError: if peft is not installed.
    """
    _refuse_adapted(model)
    # peft freezes everything but the adapters; of other parts that is not its decision.
    learning = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith((_LANGUAGE_MODEL, "lm_head."))
    ]
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            "LoRA needs the package peft; install it with `pip install 'layerfuse[lora]'`."
        ) from error
    described: Any
    if isinstance(config, peft.PeftConfig):
        described = copy.copy(config)
        trainable = not config.inference_mode if trainable is None else trainable
    elif isinstance(config, Mapping):
        described = peft.LoraConfig(**config)
    else:
        described = peft.LoraConfig.from_pretrained(str(config))
    described.inference_mode = trainable is False
    peft.inject_adapter_in_model(described, model, adapter_name=_ADAPTER)
    for parameter in learning:
        parameter.requires_grad_(True)
    for parameter in lora_weights(model).values():
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


def lora_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the adapters, by the names that PEFT gives them in its files."""
    weights = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    return {FILE_PREFIX + name.replace(f".{_ADAPTER}.", "."): parameter for name, parameter in weights.items()}


def lora_config(model: nn.Module) -> Any:
    """The `peft.LoraConfig` of a model's adapters; a ValueError if it has none."""
    configs: Any = getattr(model, "peft_config", None)
    if not configs:
        raise InputError("the model has no adapters; add some (add_lora) or load them (load_lora) first.")
    return configs[_ADAPTER]
