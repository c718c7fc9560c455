"""Checkpoints: written whole or not at all, loaded completely or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoProcessor, LlavaProcessor

from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import atomic_folder, explain_missing_config
from layerfuse.weights import fitting_weights

from .config import PARTS
from .convert.content import reading
from .convert.names import our_adapter
from .model import FusedLlavaConfig, FusedLlavaForConditionalGeneration
from .quantization import Quantization, keep_unpackable, quantization_config
from .weight_files import CONFIG_FILE, check_fit, read_json, stored_tensors

__all__ = [
    "load_adapter",
    "load_config",
    "load_model",
    "load_processor",
    "save_adapter",
    "save_model",
]


def save_model(model: FusedLlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path) -> Path:
    """Write config, weights (safetensors) and processor: whole or not at all.

    Returns:
        The folder; `AutoModelForImageTextToText.from_pretrained` reads it after `import integrations.llava`.

    Raises:
        ValueError: before anything is written, if a weight is none of those that the config describes, such as an
            adapter's; they are listed.
        OSError: if the folder cannot be written to; a model in it stays.
    """
    weights = fitting_weights(model, lambda: type(model)(model.config))
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch, state_dict=weights)
        processor.save_pretrained(scratch)
    return Path(folder)


def load_config(folder: str | Path) -> FusedLlavaConfig:
    """Read the config of a model that `save_model` wrote.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds another kind of model.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise MissingFileError(
            f"{folder} holds no {CONFIG_FILE}; give a folder that a finished training run wrote."
            f"{explain_missing_config(folder)}"
        )
    kind = read_json(folder / CONFIG_FILE).get("model_type")
    if kind != FusedLlavaConfig.model_type:
        raise InputError(
            f"{folder} holds a {kind!r} model; expected {FusedLlavaConfig.model_type!r}, as `python -m "
            "integrations.llava train` writes it. Models of MMFuser, LLaVA-1.5 and transformers' LLaVA can be "
            f"converted: python -m integrations.llava convert --from {folder} --to NEW_FOLDER"
        )
    with reading(f"{folder / CONFIG_FILE}"):
        config: FusedLlavaConfig = FusedLlavaConfig.from_pretrained(folder)
    return config


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: Quantization = "none",
) -> FusedLlavaForConditionalGeneration:
    """Load a model that `save_model` wrote.

    Args:
        folder: the folder.
        device: where to put the model.
        dtype: of its parameters, and of the computation with quantised ones.
        quantize: "int8" or "nf4" stores the language model's linear layers in 8 or 4 bits, through bitsandbytes.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds another kind of model, or weights that do not cover the model; every key is listed.
        ImportError: if bitsandbytes is needed and not installed.
    """
    config = load_config(folder)
    _check_weights(Path(folder))
    model: FusedLlavaForConditionalGeneration
    if quantize == "none":
        model = FusedLlavaForConditionalGeneration.from_pretrained(folder, config=config, dtype=dtype)
        return model.to(device).eval()  # type: ignore[no-any-return, arg-type]
    # Quantised weights cannot be moved afterwards, so they are loaded to where they belong.
    model = FusedLlavaForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        quantization_config=quantization_config(quantize, dtype),
        device_map={"": device},
    )
    keep_unpackable(model)
    return model.eval()


def _check_weights(folder: Path) -> None:
    """Open every file of weights; transformers' own errors name no file."""
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise MissingFileError(f"{folder} holds no weights (model.safetensors); copy them there again.")
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}); copy it there again.") from error


def load_processor(folder: str | Path) -> LlavaProcessor:
    """Load the processor that was saved beside a model.

    Raises:
        FileNotFoundError: if there is no such folder, or a save into it was killed half-way.
        ValueError: if it lacks files of the processor, or they are damaged.
    """
    if not Path(folder).is_dir():
        raise MissingFileError(f"{folder} does not exist; give a folder that a finished training run wrote.")
    interrupted = "" if (Path(folder) / CONFIG_FILE).is_file() else explain_missing_config(folder)
    if interrupted:
        raise MissingFileError(f"{folder} holds no {CONFIG_FILE}.{interrupted}")
    with reading(f"the processor in {folder}"):
        processor: LlavaProcessor = AutoProcessor.from_pretrained(folder)
    return processor


def save_adapter(model: nn.Module, parts: Sequence[str], path: str | Path) -> Path:
    """Write the parameters of some parts, such as fuser and projector after the first stage.

    Args:
        model: the whole model.
        parts: names from `PARTS`.
        path: a `.safetensors` file.

    Returns:
        The path.
    """
    path = Path(path)
    with atomic_folder(path.parent) as scratch:
        save_file(_state_of(model, parts), scratch / path.name, metadata={"format": "pt", "parts": ",".join(parts)})
    return path


def load_adapter(model: nn.Module, parts: Sequence[str], path: str | Path) -> None:
    """Load fuser and projector into a model: what `save_adapter` wrote, or the published code's stage 1.

    Args:
        model: the whole model, changed in place.
        parts: the parts that the file has to cover.
        path: a `.safetensors` file, or one that `torch.save` wrote (`mm_projector.bin`), read without running code.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds code, a published fuser lost its scales, or its keys are not those of the
            parts; all are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"adapter {path} does not exist; run the stage that writes it first.")
    stored = stored_tensors(path)
    if any("mm_projector." in name for name in stored):
        stored = our_adapter(stored)
    check_fit(
        _state_of(model, parts),
        stored,
        fault=f"adapter {path} does not fit the {', '.join(parts)} of this model",
        advice="Use the recipe's own model settings",
    )
    model.load_state_dict({name: tensor.read() for name, tensor in stored.items()}, strict=False)


def _state_of(model: nn.Module, parts: Sequence[str]) -> dict[str, torch.Tensor]:
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
