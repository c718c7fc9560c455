"""The model: LLaVA on transformers with a layerfuse backbone and fuser inside; its config, processor and builder."""

from __future__ import annotations

from .build import (
    Assembled,
    assemble,
    assemble_stage,
    build_on_meta,
    check_vocabulary,
    checkpoint_activations,
    described_llm,
    llm_config,
    load_tokenizer,
    set_trainable,
)
from .generation import end_answers
from .language_head import describe_head
from .lora import ADAPTER, import_peft, inject_lora, lora_config, lora_weights, merge_lora
from .model import (
    FusedLlavaConfig,
    FusedLlavaForConditionalGeneration,
    FusedLlavaModel,
    LayerfuseVisionConfig,
    build_model,
    learns,
)
from .processing import LayerfuseImageProcessor, add_image_token, build_processor
from .quantization import QUANTIZATIONS, Quantization, keep_unpackable, quantization_config

__all__ = [
    "ADAPTER",
    "QUANTIZATIONS",
    "Assembled",
    "FusedLlavaConfig",
    "FusedLlavaForConditionalGeneration",
    "FusedLlavaModel",
    "LayerfuseImageProcessor",
    "LayerfuseVisionConfig",
    "Quantization",
    "add_image_token",
    "assemble",
    "assemble_stage",
    "build_model",
    "build_on_meta",
    "build_processor",
    "check_vocabulary",
    "checkpoint_activations",
    "describe_head",
    "described_llm",
    "end_answers",
    "import_peft",
    "inject_lora",
    "keep_unpackable",
    "learns",
    "llm_config",
    "load_tokenizer",
    "lora_config",
    "lora_weights",
    "merge_lora",
    "quantization_config",
    "set_trainable",
]
