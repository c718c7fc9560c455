"""What a stage leaves in the run's folder: fuser and projector; after the last one adapters and the whole model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaProcessor

from integrations.llava.checkpoints import save_connector, save_lora, save_model
from integrations.llava.config import StageConfig
from integrations.llava.modeling import (
    Assembled,
    FusedLlavaForConditionalGeneration,
    build_processor,
    end_answers,
    merge_lora,
)
from layerfuse.preprocessing import AnyPreprocessing

from .run_folder import RunFolder

__all__ = ["CONNECTOR", "adapter_parts", "stage_preprocessing", "stage_processor", "write_stage_result"]

CONNECTOR = ("fuser", "projector")
"""Parts of the model that every stage trains."""


def adapter_parts(config: StageConfig) -> tuple[str, ...]:
    """Parts that a stage's adapter file holds."""
    return (*CONNECTOR, "backbone") if "backbone" in config.trainable else CONNECTOR


def stage_preprocessing(model: FusedLlavaForConditionalGeneration, config: StageConfig) -> AnyPreprocessing:
    """How a stage brings images to the backbone's size."""
    backbone = model.model.vision_tower.backbone
    return backbone.preprocessing.changed(mode=config.data.image_mode, upright=config.data.upright)


def stage_processor(assembled: Assembled, config: StageConfig) -> LlavaProcessor:
    """What prepares texts and images for a stage's model once it is trained; the model is told its template."""
    model, template = assembled.model, assembled.template
    assert template is not None
    model.config.prompt_template = template.to_dict()
    return build_processor(model, assembled.tokenizer, stage_preprocessing(model, config), template)


def write_stage_result(
    assembled: Assembled, config: StageConfig, folder: RunFolder, stage: str, *, whole_model: bool
) -> None:
    """Write a stage's fuser and projector, and the whole model if asked for, which is then on the CPU.

    Raises:
        OSError: if they cannot be written.
    """
    model, tokenizer = assembled.model, assembled.tokenizer
    assert assembled.template is not None
    save_connector(model, adapter_parts(config), folder.adapter(stage))
    if not whole_model:
        return
    if config.lora.rank:
        save_lora(model, folder.path / stage / "lora")
        merge_lora(model)
    end_answers(model.generation_config, tokenizer, assembled.template)
    model.eval().to("cpu")
    if config.precision == "bf16":
        nn.Module.to(model, torch.bfloat16)
    save_model(model, stage_processor(assembled, config), folder.path)
