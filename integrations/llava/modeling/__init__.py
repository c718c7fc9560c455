"""The model: LLaVA on transformers with a layerfuse backbone and fuser inside; its config, processor and builder."""

from __future__ import annotations

from .build import (
    Assembled,
    assemble,
    build_model,
    build_recipe_model,
    checkpoint_activations,
    explained_loading,
    read_language_files,
)
from .compilation import check_compiler, compile_vision
from .condition import blank_condition
from .generation import end_answers, forbid_token
from .image_maps import image_maps
from .injection import InjectedFeatures, LayerInjection, injection_settings
from .language_head import LOSS_CHUNK, describe_head
from .lora import FILE_PREFIX, inject_lora, lora_config, lora_weights, merge_lora
from .mergers import Merger
from .model import (
    FusedLlavaConfig,
    FusedLlavaForConditionalGeneration,
    FusedLlavaModel,
    LayerfuseVisionConfig,
)
from .packing import attend_by_sample, check_packing
from .parts import count_parameters, learns, part_of, set_trainable
from .processing import LayerfuseImageProcessor, add_image_token, build_processor
from .quantization import QUANTIZATIONS, Quantization, quantization_config
from .source import ModelSource, RecipeParts
from .staging import fit_to_stage, language_dtype
from .vision import numbered_layers

__all__ = [
    "FILE_PREFIX",
    "LOSS_CHUNK",
    "QUANTIZATIONS",
    "Assembled",
    "FusedLlavaConfig",
    "FusedLlavaForConditionalGeneration",
    "FusedLlavaModel",
    "InjectedFeatures",
    "LayerInjection",
    "LayerfuseImageProcessor",
    "LayerfuseVisionConfig",
    "Merger",
    "ModelSource",
    "Quantization",
    "RecipeParts",
    "add_image_token",
    "assemble",
    "attend_by_sample",
    "blank_condition",
    "build_model",
    "build_processor",
    "build_recipe_model",
    "check_compiler",
    "check_packing",
    "checkpoint_activations",
    "compile_vision",
    "count_parameters",
    "describe_head",
    "end_answers",
    "explained_loading",
    "fit_to_stage",
    "forbid_token",
    "image_maps",
    "inject_lora",
    "injection_settings",
    "language_dtype",
    "learns",
    "lora_config",
    "lora_weights",
    "merge_lora",
    "numbered_layers",
    "part_of",
    "quantization_config",
    "read_language_files",
    "set_trainable",
]
