"""LoRA folders of the published code: adapters, what else was trained, and the name of the model they belong to.

adapter_config.json, adapter_model.*      PEFT's, over the published names of the language model's layers
non_lora_trainables.bin                   the projector (with the fuser), and whatever else learned
config.json                               of the whole model

No tokenizer and none of the model's own weights: they are the base's, a language model or another published checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerfuse.errors import InputError, MissingFileError

from ..content import Options
from ..lora import ADAPTER_CONFIG, merged_tensors
from ..tensors import StoredTensor, holds_model, read_json, stored_model, stored_tensors
from ..vision_weights import find_model

__all__ = ["adapted_model", "find_base", "is_adapted", "trained_along"]

_OTHERS = "non_lora_trainables.bin"


def is_adapted(folder: Path) -> bool:
    """Whether a folder holds adapters for a model, and not the model itself."""
    return (folder / ADAPTER_CONFIG).is_file() and not holds_model(folder)


def find_base(folder: Path, config: Mapping[str, Any], options: Options) -> Path:
    """Folder of the model that the adapters in a folder, whose `config.json` is `config`, were trained on.

    Raises:
        ValueError: if nothing names it, or it cannot be found; the message says what to give.
    """
    advice = (
        "Give its folder, with config, tokenizer and weights: --base FOLDER (convert), --model.checkpoint_base FOLDER "
        "(train), Options(base=FOLDER)"
    )
    noted = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    name = options.base or noted or config.get("_name_or_path")
    if not name:
        raise InputError(f"{folder} holds adapters and does not say for which model. {advice}.")
    return find_model(str(name), beside=folder, what="the model that the adapters were trained on,", advice=advice)


def adapted_model(folder: Path, base: Path) -> dict[str, StoredTensor]:
    """Weights of the base with those of a LoRA folder, under published names; adapters are merged when they are read.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file cannot be read, or adapters do not fit the base.
    """
    others = folder / _OTHERS
    if not others.is_file():
        raise MissingFileError(
            f"{folder} holds adapters, but no {_OTHERS} with the projector that was trained along; copy it there, too."
        )
    return merged_tensors(stored_model(base) | trained_along(folder), folder)


def trained_along(folder: Path) -> dict[str, StoredTensor]:
    """What a LoRA folder holds beside its adapters, under published names; nothing if there is no such file."""
    if not (folder / _OTHERS).is_file():
        return {}
    # Behind the wrappers of PEFT: one, or that and the causal model's own.
    stored = {name.removeprefix("base_model."): tensor for name, tensor in stored_tensors(folder / _OTHERS).items()}
    inner = any(name.startswith("model.model.") for name in stored)
    return {re.sub(r"^model\.", "", name) if inner else name: tensor for name, tensor in stored.items()}
