"""Where the stages of a run take their model from; here: the parts that a recipe names."""

from __future__ import annotations

import abc
from dataclasses import replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from integrations.llava.config import AS_MODEL, STAGES, ModelConfig, Recipe, StageConfig
from integrations.llava.prompts import TOKENIZER, Template, find_template, get_template
from layerfuse.errors import InputError

from .build import Assembled, LanguageFiles, assemble, build_recipe_model, read_language_files
from .model import FusedLlavaForConditionalGeneration
from .vision import numbered_layers

__all__ = ["ModelSource", "RecipeParts"]


class ModelSource(abc.ABC):
    """Where the stages of a run take their model from: whenever it is built for one, it is the same.

    Attributes:
        has_connector: whether fuser and projector come trained; else they start from random weights.
    """

    has_connector: bool

    @property
    @abc.abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The language model's; None where it is not at hand and nothing is to be downloaded."""

    def template(self, stage: StageConfig) -> Template:
        """The prompt template of a stage, which fits the tokenizer as far as that is at hand.

        Raises:
            ValueError: as `find_template`, or if a template cannot be made of a tokenizer that is not at hand.
        """
        if self.tokenizer is not None:
            return find_template(stage.template, self.tokenizer)
        if stage.template == TOKENIZER:
            raise InputError(
                f"template: {TOKENIZER} is made of the language model's tokenizer, which is not at hand, and nothing "
                "is downloaded here; download it first, or name a template."
            )
        return get_template(stage.template)

    @property
    @abc.abstractmethod
    def described_by(self) -> str:
        """What says how large the language model is, for people to read."""

    @abc.abstractmethod
    def resolved(self, recipe: Recipe) -> Recipe:
        """The recipe with values in place of what it leaves to the model.

        Raises:
            ValueError: if the model does not say; the key is named.
        """

    @abc.abstractmethod
    def on_meta(self, stage: StageConfig) -> FusedLlavaForConditionalGeneration:
        """The model as a stage trains it, on the meta device: nothing is allocated, loaded or quantised.

        Raises:
            ValueError: if a name, layer or option is not possible.
            ImportError: if adapters are asked for and peft is not installed.
        """

    @abc.abstractmethod
    def assemble(self, stage: StageConfig, *, quantized: bool = True, seed: int | None = None) -> Assembled:
        """The model as a stage begins with it, weights loaded, and its tokenizer.

        Args:
            stage: says what learns, and how precisely.
            quantized: store a quantised stage's language model so; False to merge adapters into whole weights.
            seed: of what is not loaded, as for `build_recipe_model`.

        Raises:
            ValueError: as `on_meta`, or if weights do not fit.
            ImportError: if a package is missing.
        """


class RecipeParts(ModelSource):
    """The parts that a recipe names; `offline` downloads nothing that is only looked at, as `read_language_files`."""

    has_connector = False

    def __init__(self, config: ModelConfig, *, offline: bool = False) -> None:
        self.config, self.offline = config, offline

    @cached_property
    def _files(self) -> LanguageFiles:
        return read_language_files(self.config, offline=self.offline)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Read with the language model's config."""
        return self._files.tokenizer

    @property
    def described_by(self) -> str:
        """Say whether the language model's own config was at hand."""
        return "config: the recipe's llm_architecture" if self._files.described else "its own config"

    def resolved(self, recipe: Recipe) -> Recipe:
        """Put numbers where the layers are left to the fuser; there is no template or image mode to take over."""
        for name in STAGES:
            stage = recipe.stage(name)
            left = {f"{name}.template": stage.template, f"{name}.data.image_mode": stage.data.image_mode}
            for key, value in left.items():
                if value == AS_MODEL:
                    raise InputError(
                        f"{key} is {AS_MODEL!r}, which is that of a model to go on from, and the recipe names none; "
                        "give it here, or name the model (--from, model.checkpoint)."
                    )
        return replace(recipe, model=numbered_layers(recipe.model))

    def on_meta(self, stage: StageConfig) -> FusedLlavaForConditionalGeneration:
        """Build it of the parts, without their weights."""
        return build_recipe_model(self.config, self._files, stage, device="meta")

    def assemble(self, stage: StageConfig, *, quantized: bool = True, seed: int | None = None) -> Assembled:
        """Read the parts, and build it."""
        return assemble(self.config, stage, quantized=quantized, seed=seed)
