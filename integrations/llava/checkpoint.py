"""Checkpoints: written whole or not at all, loaded completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoProcessor, LlavaProcessor

from .config import PARTS
from .model import FusedLlavaConfig, FusedLlavaForConditionalGeneration

__all__ = ["atomic_folder", "load_adapter", "load_model", "load_processor", "save_adapter", "save_model", "write_text"]

_CONFIG_FILE = "config.json"


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Give a scratch folder whose files move into `folder` when the block ends without error.

    The config moves last: a folder with a config has its weights. Files of other names stay where they are.

    Args:
        folder: made if need be.

    Yields:
        The scratch folder, on the same file system.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield scratch
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == _CONFIG_FILE):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place, then rename it."""
    scratch = path.with_name(f".{path.name}.saving")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def save_model(model: FusedLlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path) -> Path:
    """Write config, weights (safetensors) and processor.

    Returns:
        The folder; `AutoModelForImageTextToText.from_pretrained` reads it after `import integrations.llava`.
    """
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
    return Path(folder)


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> FusedLlavaForConditionalGeneration:
    """Load a model that `save_model` wrote.

    Args:
        folder: the folder.
        device: where to put the model.
        dtype: of its parameters.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds another kind of model, or weights that do not cover the model; every key is listed.
    """
    folder = Path(folder)
    if not (folder / _CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {_CONFIG_FILE}; give a folder that a finished training run wrote.")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, FusedLlavaConfig):
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model; expected {FusedLlavaConfig.model_type!r}, as "
            "`python -m integrations.llava train` writes it."
        )
    model: FusedLlavaForConditionalGeneration = FusedLlavaForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=dtype
    )
    return model.to(device).eval()  # type: ignore[no-any-return, arg-type]


def load_processor(folder: str | Path) -> LlavaProcessor:
    """Load the processor that was saved beside a model."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.saving")
    save_file(_state_of(model, parts), scratch, metadata={"format": "pt", "parts": ",".join(parts)})
    os.replace(scratch, path)
    return path


def load_adapter(model: nn.Module, parts: Sequence[str], path: str | Path) -> None:
    """Load what `save_adapter` wrote into a model.

    Args:
        model: the whole model, changed in place.
        parts: the parts that the file has to cover.
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, or its keys are not those of the parts; all are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"adapter {path} does not exist; run the stage that writes it first.")
    try:
        loaded = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"adapter {path} is not a whole safetensors file ({error}); write it anew.") from error
    expected = _state_of(model, parts)
    missing, unexpected = sorted(expected.keys() - loaded.keys()), sorted(loaded.keys() - expected.keys())
    misshapen = sorted(name for name in expected.keys() & loaded.keys() if expected[name].shape != loaded[name].shape)
    if missing or unexpected or misshapen:
        raise ValueError(
            f"adapter {path} does not fit the {', '.join(parts)} of this model. Missing: {', '.join(missing) or 'none'}"
            f"; unexpected: {', '.join(unexpected) or 'none'}; of another shape: {', '.join(misshapen) or 'none'}. Use "
            "the recipe's own model settings."
        )
    model.load_state_dict(loaded, strict=False)


def _state_of(model: nn.Module, parts: Sequence[str]) -> dict[str, torch.Tensor]:
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
