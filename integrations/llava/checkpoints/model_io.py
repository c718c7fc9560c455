"""Folders of a model: written whole or not at all, loaded completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor, GenerationConfig, LlavaProcessor

from integrations.llava.modeling import (
    FusedLlavaConfig,
    FusedLlavaForConditionalGeneration,
    LayerfuseVisionConfig,
    Quantization,
    build_processor,
    forbid_token,
    quantization_config,
)
from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import atomic_folder, explain_missing_config
from layerfuse.weights import fitting_weights

from .content import Content, Options, reading
from .reading import read_checkpoint
from .tensors import CONFIG_FILE, read_json

__all__ = ["load_config", "load_content", "load_model", "load_processor", "save_model"]


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


def load_config(folder: str | Path, *, options: Options | None = None) -> FusedLlavaConfig:
    """The config of a model that `save_model` wrote, or of a checkpoint of another layout, as ours.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds another kind of model.
    """
    folder = Path(folder)
    content = _of_other_layout(folder, options)
    if content is not None:
        content.model.config.dtype = content.dtype
        return content.model.config
    with reading(f"{folder / CONFIG_FILE}"):
        config: FusedLlavaConfig = FusedLlavaConfig.from_pretrained(folder)
    return config


def _of_other_layout(folder: Path, options: Options | None) -> Content | None:
    """Content of a checkpoint, or None for a model of our own layout."""
    if not (folder / CONFIG_FILE).is_file():
        raise MissingFileError(
            f"{folder} holds no {CONFIG_FILE}; give a folder that a finished training run wrote."
            f"{explain_missing_config(folder)}"
        )
    own = read_json(folder / CONFIG_FILE).get("model_type") == FusedLlavaConfig.model_type
    return None if own else read_checkpoint(folder, options or Options())


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: Quantization = "none",
    options: Options | None = None,
) -> FusedLlavaForConditionalGeneration:
    """Load a model that `save_model` wrote, or a checkpoint of another layout.

    Args:
        folder: of the model.
        device: where to put the model.
        dtype: of its parameters, and of the computation with quantised ones.
        quantize: "int8" or "nf4" stores the language model's linear layers in 8 or 4 bits, through bitsandbytes.
        options: what the files of another layout do not say, as for `convert`.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds another kind of model, weights that do not cover the model (every key is listed), or a
            processor that prepares images for another backbone.
        ImportError: if bitsandbytes is needed and not installed.
    """
    content = _of_other_layout(Path(folder), options)
    if content is not None:
        return load_content(content, dtype, quantize=quantize, device=device).eval()
    config = load_config(folder)
    _check_weights(Path(folder))
    _check_preprocessing(config, Path(folder))
    return _load(folder, {"config": config, "dtype": dtype}, quantize, device).eval()


def load_content(
    content: Content,
    dtype: torch.dtype,
    *,
    quantize: Quantization = "none",
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> FusedLlavaForConditionalGeneration:
    """Load the model of a checkpoint's content, whatever layout it came from; arguments are those of `load_model`.

    `attention` is transformers' name of an implementation; None leaves the choice to transformers.
    """
    # Copied: what is read is the file's mapped memory, and training would change what is read the next time.
    weights = {name: tensor.read().to(dtype, copy=True) for name, tensor in content.tensors.items()}
    given: dict[str, Any] = {"config": content.model.config, "dtype": dtype, "state_dict": weights}
    if attention is not None:
        given["attn_implementation"] = attention
    model = _load(None, given, quantize, device)
    model.generation_config = GenerationConfig(**content.generation_config)
    forbid_token(model.generation_config, model.config.image_token_index)
    return model


def _load(
    folder: str | Path | None, given: dict[str, Any], quantize: Quantization, device: str | torch.device
) -> FusedLlavaForConditionalGeneration:
    bits = quantization_config(quantize, given["dtype"])
    if bits is not None:
        # Quantised weights cannot be moved afterwards, so they are loaded to where they belong.
        given = {**given, "quantization_config": bits, "device_map": {"": device}}
    model: Any = FusedLlavaForConditionalGeneration.from_pretrained(folder, **given)
    return model if bits is not None else model.to(device)  # type: ignore[no-any-return]


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


def _check_preprocessing(config: FusedLlavaConfig, folder: Path) -> None:
    """Compare the preprocessing of the processor, which counts, with that in the backbone's config."""
    assert isinstance(config.vision_config, LayerfuseVisionConfig)
    backbone = config.vision_config.backbone or {}
    named = [own.get("preprocessing", {}) for own in backbone.get("backbones", [backbone])]
    for file in (folder / name for name in ("processor_config.json", "preprocessor_config.json")):
        described = read_json(file) if file.is_file() else {}
        used = described.get("image_processor", described).get("preprocessing", {})
        parts = used.get("parts", [used])
        if used and len(parts) != len(named):
            raise InputError(
                f"{file} prepares images for {len(parts)} backbones, and {folder / CONFIG_FILE} has {len(named)}; take "
                "both files from the same model."
            )
        for own, wanted in zip(parts, named, strict=False):
            # A recipe chooses the mode, and pictures are turned when the model answers.
            other = [key for key in own.keys() & wanted.keys() - {"mode", "upright"} if own[key] != wanted[key]]
            if other:
                key = min(other)
                raise InputError(
                    f"{file} prepares images with {key} {own[key]}, but the backbone in {folder / CONFIG_FILE} takes "
                    f"{wanted[key]}; take both files from the same model."
                )


def load_processor(folder: str | Path, *, options: Options | None = None) -> LlavaProcessor:
    """Load the processor that was saved beside a model, or make that of a checkpoint of another layout.

    Raises:
        FileNotFoundError: if there is no such folder, or a save into it was killed half-way.
        ValueError: if it lacks files of the processor, or they are damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"{folder} does not exist; give a folder that a finished training run wrote.")
    interrupted = "" if (folder / CONFIG_FILE).is_file() else explain_missing_config(folder)
    if interrupted:
        raise MissingFileError(f"{folder} holds no {CONFIG_FILE}.{interrupted}")
    content = _of_other_layout(folder, options) if (folder / CONFIG_FILE).is_file() else None
    if content is not None:
        return build_processor(content.model, content.tokenizer, content.preprocessing, content.template)
    with reading(f"the processor in {folder}"):
        processor: LlavaProcessor = AutoProcessor.from_pretrained(folder)
    return processor
