"""A checkpoint of any layout as the model that the stages of a run go on from, and which of the two a run has."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from integrations.llava.config import AS_MODEL, STAGES, ModelConfig, Recipe, StageConfig
from integrations.llava.modeling import (
    Assembled,
    FusedLlavaForConditionalGeneration,
    ModelSource,
    RecipeParts,
    explained_loading,
    fit_to_stage,
    language_dtype,
)
from integrations.llava.prompts import TEMPLATES, Template
from layerfuse.errors import InputError
from layerfuse.files import file_digest

from .content import TOKENIZER_FILES, Content, Options
from .model_io import load_content
from .reading import layout_of, read_checkpoint
from .tensors import CONFIG_FILE, weight_files

__all__ = ["Checkpoint", "model_source"]


def model_source(config: ModelConfig, *, offline: bool = False) -> ModelSource:
    """Where a recipe's model comes from: its checkpoint, or its parts, of which nothing is loaded yet.

    Args:
        config: of the model.
        offline: as for `RecipeParts`.

    Raises:
        FileNotFoundError: if a file of the checkpoint is missing.
        ValueError: if the checkpoint cannot be read.
    """
    return Checkpoint(config) if config.checkpoint else RecipeParts(config, offline=offline)


class Checkpoint(ModelSource):
    """A checkpoint of any layout, with its tokenizer, template, preprocessing and generation config.

    Its files are opened here, and their weights read when a model is built.

    Args:
        config: names it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it cannot be read as what its files say it is.
    """

    has_connector = True

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        options = Options(vision_tower=config.vision_tower or None, base=config.checkpoint_base or None)
        self.content: Content = read_checkpoint(Path(config.checkpoint), options)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's."""
        return self.content.tokenizer

    def template(self, stage: StageConfig) -> Template:
        """The checkpoint's own, unless the stage says another."""
        return self.content.template if stage.template == AS_MODEL else super().template(stage)

    @property
    def described_by(self) -> str:
        """Name folder and layout."""
        return f"{self.config.checkpoint}, layout {layout_of(self.config.checkpoint)}"

    @cached_property
    def digest(self) -> str:
        """Digest of all files of weights, of the config and the tokenizer: about a second for a gigabyte."""
        found = hashlib.blake2b(digest_size=16)
        for folder in (self.content.folder, *self.content.elsewhere):
            small = [folder / name for name in (CONFIG_FILE, *TOKENIZER_FILES)]
            for file in (*filter(Path.is_file, small), *weight_files(folder)):
                found.update(file.name.encode() + b"\0" + file_digest(file))
        return found.hexdigest()

    def resolved(self, recipe: Recipe) -> Recipe:
        """Put the checkpoint's template and image mode where none is said."""
        stages = {}
        for name in STAGES:
            stage = recipe.stage(name)
            own = self.content.template
            # One that is known under its name is said; another stays "as the model has it".
            if stage.template == AS_MODEL and TEMPLATES.get(own.name) == own:
                stage = replace(stage, template=own.name)
            if stage.data.image_mode == AS_MODEL:
                stage = replace(stage, data=replace(stage.data, image_mode=self._image_mode(name)))
            stages[name] = stage
        return replace(recipe, **stages)  # type: ignore[arg-type]

    def _image_mode(self, stage: str) -> Any:
        described = self.content.preprocessing.to_dict()
        modes = {part["mode"] for part in described.get("parts", [described])}
        if len(modes) > 1:
            raise InputError(
                f"the backbones of {self.config.checkpoint} take images in several ways ({', '.join(sorted(modes))}), "
                f"and a stage in one; say which: --{stage}.data.image_mode MODE."
            )
        return modes.pop()

    def on_meta(self, stage: StageConfig) -> FusedLlavaForConditionalGeneration:
        """Build it of its config."""
        with torch.device("meta"):
            model = FusedLlavaForConditionalGeneration(deepcopy(self.content.model.config))
            fit_to_stage(model, stage)
        return model

    def assemble(self, stage: StageConfig, *, quantized: bool = True, seed: int | None = None) -> Assembled:
        """Read its weights."""
        dtype = language_dtype(stage)
        quantize = stage.lora.quantize if quantized else "none"
        device = "cpu" if quantize == "none" else PartialState().device
        with explained_loading(f"the model {self.config.checkpoint}", "model.checkpoint, model.attention"):
            model = load_content(self.content, dtype, quantize=quantize, device=device, attention=self.config.attention)
        _forget_quantization(model)
        fit_to_stage(model, stage, seed=None if seed is None else stage.seed)
        for name, parameter in model.named_parameters():
            # What learns is float32, and was rounded on its way.
            if parameter.requires_grad and dtype != torch.float32 and name in self.content.tensors:
                parameter.data = self.content.tensors[name].read().to(torch.float32, copy=True)
        tokenizer: PreTrainedTokenizerBase = deepcopy(self.content.tokenizer)
        return Assembled(model, tokenizer, model.config.image_token_index, self.template(stage))


def _forget_quantization(model: nn.Module) -> None:
    """Let the model pass for a plain one, as one whose language model alone was loaded quantised does.

    transformers' Trainer takes no quantised model but with adapters that transformers put in itself.
    """
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            delattr(model, name)
