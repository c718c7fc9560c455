"""Tiny models of every kind that is promised, each with its library's own way of getting the same hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerfuse.backbones import BACKBONES, Backbone
from layerfuse.testing import randomise_parameters
from tools.model_table.hidden_states import (
    beit_hidden_states,
    hugging_face_hidden_states,
    naflex_hidden_states,
    open_clip_hidden_states,
    siglip2_hidden_states,
    timm_hidden_states,
)

NUM_BLOCKS = 3
WIDTH = 32


@dataclass(frozen=True)
class Case:
    """One tiny model.

    ``build`` gives a whole model; ``hidden_states`` runs it the library's way and gives all layers 0..NUM_BLOCKS, each
    (B, P + N, C).
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    hidden_states: Callable[[Any, torch.Tensor], list[torch.Tensor]]
    num_prefix_tokens: int
    patch_size: int
    image_size: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return randomise_parameters(self.build(), std=0.1).eval()

    def backbone(self, model: nn.Module, layers: int | tuple[int, ...]) -> Backbone:
        family: Any = BACKBONES.get(self.family)
        return family(model, layers=layers, **self.facts).eval()

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        sizes = {"embed_dim": WIDTH, "depth": NUM_BLOCKS, "num_heads": 2}
        return timm.create_model(name, pretrained=False, **{**sizes, **options})

    return build


def open_clip_native(**vision: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import open_clip

        sizes = {"width": WIDTH, "layers": NUM_BLOCKS, "head_width": 16, "patch_size": 14, "image_size": 42}
        text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
        return open_clip.CLIP(
            embed_dim=16, vision_cfg=open_clip.CLIPVisionCfg(**{**sizes, **vision}), text_cfg=text, quick_gelu=True
        ).visual

    return build


def open_clip_timm(trunk: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from open_clip.timm_model import TimmModel

        tower = TimmModel("test_vit", embed_dim=16, image_size=48, pool="", proj="none")
        tower.trunk = trunk()
        tower.head = nn.Sequential(nn.Linear(WIDTH, 16))
        return tower

    return build


def hugging_face(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import AutoConfig, AutoModel

        sizes = {"hidden_size": WIDTH, "num_hidden_layers": NUM_BLOCKS, "num_attention_heads": 2}
        config = AutoConfig.for_model(kind, **{**sizes, "intermediate_size": 64, "image_size": 48, **options})
        return AutoModel.from_config(config)

    return build


SIGLIP = timm_model("vit_base_patch16_siglip_224", img_size=48)
EVA02_CLIP = timm_model("eva02_base_patch16_clip_224", img_size=48)

CASES = (
    Case(
        "clip", "timm", timm_model("vit_large_patch14_clip_quickgelu_336", img_size=42), timm_hidden_states, 1, 14, 42
    ),
    Case("siglip", "timm", SIGLIP, timm_hidden_states, 0, 16, 48),
    Case("eva02_clip", "timm", EVA02_CLIP, timm_hidden_states, 1, 16, 48),
    Case(
        "eva02_clip_postnorm",
        "timm",
        timm_model("eva02_enormous_patch14_clip_224", img_size=42),
        timm_hidden_states,
        1,
        14,
        42,
    ),
    Case("dinov2_reg", "timm", timm_model("vit_small_patch14_reg4_dinov2", img_size=42), timm_hidden_states, 5, 14, 42),
    Case("dinov3", "timm", timm_model("vit_small_patch16_dinov3", img_size=48), timm_hidden_states, 5, 16, 48),
    Case("aimv2", "timm", timm_model("aimv2_large_patch14_224", img_size=42), timm_hidden_states, 0, 14, 42),
    Case("pe", "timm", timm_model("vit_pe_core_base_patch16_224", img_size=48), timm_hidden_states, 1, 16, 48),
    Case("intern", "timm", timm_model("vit_intern300m_patch14_448", img_size=42), timm_hidden_states, 1, 14, 42),
    Case("radio", "timm", timm_model("vit_base_patch16_radio_v3", img_size=48), timm_hidden_states, 8, 16, 48),
    Case("beit", "timm", timm_model("beit_base_patch16_224", img_size=48), beit_hidden_states, 1, 16, 48),
    Case(
        "siglip2_naflex",
        "timm",
        timm_model("naflexvit_so400m_patch16_siglip", pos_embed_grid_size=(3, 3)),
        naflex_hidden_states,
        0,
        16,
        48,
    ),
    Case("clip", "open_clip", open_clip_native(), open_clip_hidden_states, 1, 14, 42),
    Case("coca", "open_clip", open_clip_native(attentional_pool=True), open_clip_hidden_states, 1, 14, 42),
    Case("eva02_clip", "open_clip", open_clip_timm(EVA02_CLIP), open_clip_hidden_states, 1, 16, 48),
    Case("siglip", "open_clip", open_clip_timm(SIGLIP), open_clip_hidden_states, 0, 16, 48),
    Case(
        "clip", "transformers", hugging_face("clip_vision_model", patch_size=16), hugging_face_hidden_states, 1, 16, 48
    ),
    Case(
        "siglip",
        "transformers",
        hugging_face("siglip_vision_model", patch_size=16),
        hugging_face_hidden_states,
        0,
        16,
        48,
    ),
    Case(
        "siglip2_naflex",
        "transformers",
        hugging_face("siglip2_vision_model", patch_size=16, num_patches=9),
        siglip2_hidden_states,
        0,
        16,
        48,
    ),
    Case("dinov2", "transformers", hugging_face("dinov2", patch_size=16), hugging_face_hidden_states, 1, 16, 48),
    Case(
        "dinov2_reg",
        "transformers",
        hugging_face("dinov2_with_registers", patch_size=16, num_register_tokens=4),
        hugging_face_hidden_states,
        5,
        16,
        48,
    ),
    Case(
        "dinov3",
        "transformers",
        hugging_face("dinov3_vit", patch_size=16, num_register_tokens=4),
        hugging_face_hidden_states,
        5,
        16,
        48,
    ),
    Case(
        "aimv2",
        "transformers",
        hugging_face("aimv2_vision_model", patch_size=16),
        hugging_face_hidden_states,
        0,
        16,
        48,
    ),
    Case("vit", "transformers", hugging_face("vit", patch_size=16), hugging_face_hidden_states, 1, 16, 48),
    Case(
        "internvl",
        "transformers",
        hugging_face("internvl_vision", patch_size=16),
        hugging_face_hidden_states,
        1,
        16,
        48,
    ),
    Case(
        "mlcd", "transformers", hugging_face("mlcd_vision_model", patch_size=16), hugging_face_hidden_states, 1, 16, 48
    ),
    Case(
        "beit",
        "transformers",
        hugging_face("beit", patch_size=16, use_relative_position_bias=True),
        hugging_face_hidden_states,
        1,
        16,
        48,
    ),
    Case("deit", "transformers", hugging_face("deit", patch_size=16), hugging_face_hidden_states, 2, 16, 48),
    Case("ijepa", "transformers", hugging_face("ijepa", patch_size=16), hugging_face_hidden_states, 0, 16, 48),
)
