"""A tiny model that is never trained, yet answers in readable text that depends on image and question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from integrations.llava.checkpoints.model_io import save_model
from integrations.llava.config import InjectionConfig
from integrations.llava.image_layout import AnyResLayout, ImageSize
from integrations.llava.inference.sampling import SamplingParams
from integrations.llava.modeling.build import build_model
from integrations.llava.modeling.processing import add_image_token, build_processor
from integrations.llava.prompts import get_template
from layerfuse.backbones import create_backbone
from layerfuse.fusers import create_fuser
from layerfuse.testing import randomise_parameters
from tests.integrations.llava.tiny_parts import make_tokenizer, tiny_llm

__all__ = ["PROMPTS", "SAMPLED", "save_run"]

PROMPTS = [
    "What number?",
    "What number is it, and where is it, and on what wall is it, in a chat between a curious user and an assistant?",
    "a",
    "",
    "Sure?",
    "One two three four five six seven eight nine ten.",
    "</s>",
    "It is number one on a wall. " * 20,
]
SAMPLED = SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=3)


def save_run(
    folder: Path,
    backbone_folder: Path,
    *,
    width: int = 32,
    template: str = "v1",
    ends: bool | float = True,
    positions: int = 512,
    fuser: str = "mmfuser",
    fuser_options: Mapping[str, Any] | None = None,
    injection: InjectionConfig | None = None,
    pinpoints: Sequence[ImageSize] = (),
    seed: int = 0,
) -> Path:
    """Save a random model with a fuser that fuses, and a projector strong enough for images to matter.

    Tokens that are single bytes lose against words, so that answers are text. The end comes after some words, or never;
    `ends` as a number is how much it is favoured. With pinpoints, images are cut into tiles.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("llama")
    image_token_id = add_image_token(tokenizer)
    backbone = create_backbone(f"transformers:{backbone_folder}", layers=(1, 2, 3, 4))
    options = {"num_heads": 4, **(fuser_options or {})}
    fused = create_fuser(fuser, in_channels=backbone.embed_dim, num_layers=4, options=options)
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    llm = tiny_llm(len(tokenizer), hidden_size=width, intermediate_size=2 * width, max_position_embeddings=positions)
    written = get_template(template)
    layout = AnyResLayout(image_token_id, (32, 32), (4, 4), tuple(pinpoints)) if pinpoints else None
    model = build_model(
        backbone,
        fused,
        llm,
        image_token_id=image_token_id,
        prompt_template=written.to_dict(),
        layout=layout,
        injection=injection,
    )
    if model.model.injection is not None:
        randomise_parameters(model.model.injection)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(10)
        model.lm_head.weight[3:259] = 0
        model.lm_head.weight[2] *= 1.6 if ends is True else float(ends)
    save_model(model, build_processor(model, tokenizer, backbone.preprocessing, written), folder)
    return folder
