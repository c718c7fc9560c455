"""LLaVA twice, of one size: as a recipe of ours describes it, and as transformers has it, without a fuser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.session import Session
from integrations.llava.config import Recipe, StageConfig, load_recipe
from integrations.llava.dry_run.gpus import GPUS, Gpu
from integrations.llava.modeling import Assembled, assemble
from integrations.llava.synthetic import BACKBONE_FOLDER, LLM_FOLDER

__all__ = ["assemble_ours", "gpu_of", "load_size", "plain_model"]

# Weights are random and the tokenizer, which is at hand everywhere, is the demo's.
_RANDOM = {"model.backbone_pretrained": False, "model.llm_pretrained": False, "model.tokenizer": str(LLM_FOLDER)}


def load_size(session: Session, *, blocks: int | None = None) -> Recipe:
    """Return the recipe whose size is measured: tiny on the CPU, LLaVA-1.5-7B with MMFuser on a GPU.

    ``blocks``: of the language model, where not all fit.
    """
    if session.device == "cpu":
        return load_recipe("tiny")
    fewer = {} if blocks is None else {"model.llm_architecture.num_hidden_layers": blocks}
    return load_recipe("mmfuser_7b", {**_RANDOM, **fewer})


def gpu_of(session: Session) -> Gpu:
    """Return the data sheet of the device; on a CPU that of an H200, so that formulas can be tried."""
    name = torch.cuda.get_device_name().lower() if session.device == "cuda" else "h200"
    return next((gpu for key, gpu in GPUS.items() if key.split("-")[0] in name), GPUS["h100"])


def assemble_ours(session: Session, recipe: Recipe, stage: StageConfig | None) -> Assembled:
    """Build the recipe's model where it will run."""
    with torch.device(session.device):
        return assemble(recipe.model, stage, seed=session.seed)


def plain_model(session: Session, ours: Assembled, stage: StageConfig | None) -> nn.Module:
    """Build transformers' LLaVA with the same backbone whole, the same language model, and the same parts frozen.

    Precisions are ours, too: what learns is float32, what is frozen has the type of the computation.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=_untyped(_vision_config(session)),
        text_config=_untyped(ours.model.config.get_text_config().to_dict()),
        image_token_index=ours.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    frozen = torch.bfloat16 if stage is not None and stage.precision == "bf16" else torch.float32
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(frozen)
        with torch.device(session.device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    if session.device == "cpu":
        _load_weights(model)
    trained = () if stage is None else stage.trainable
    for name, parameter in model.named_parameters():
        learns = ("multi_modal_projector" in name and "projector" in trained) or (
            ("language_model" in name or "lm_head" in name) and "llm" in trained
        )
        parameter.requires_grad_(learns)
        if learns:
            parameter.data = parameter.data.float()
    return model


def _vision_config(session: Session) -> dict[str, Any]:
    from transformers import CLIPVisionConfig

    if session.device == "cpu":
        return CLIPVisionConfig.from_pretrained(BACKBONE_FOLDER).to_dict()
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    ).to_dict()


def _untyped(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out the type in which weights were saved: it would decide that of the part."""
    return {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}


def _load_weights(model: Any) -> None:
    """Give the plain model the weights that ours begins with: the demo's backbone and language model."""
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    llm = AutoModelForCausalLM.from_pretrained(LLM_FOLDER).float()
    model.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(BACKBONE_FOLDER).float().state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
