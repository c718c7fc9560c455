"""Architectures that two or three libraries have, as each builds them: tiny, or at full width with four blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from layerfuse.backbones import BACKBONES, Backbone
from layerfuse.testing import randomise_parameters
from tools.library_parity.builders import (
    NUM_BLOCKS,
    NUM_HEADS,
    WIDTH,
    Builder,
    open_clip_model,
    open_clip_timm_model,
    timm_model,
    transformers_model,
)
from tools.library_parity.weights import carry_weights

__all__ = ["ARCHITECTURES", "FULL_SIZE", "PUBLISHED", "Architecture"]

ALL_LAYERS = tuple(range(NUM_BLOCKS + 1))


@dataclass(frozen=True, eq=False)
class Architecture:
    """An architecture as libraries build it.

    Attributes:
        name: of the architecture.
        models: for each library, what builds its model; the first one's weights are carried to the others.
        size: (height, width) of the images, in pixels.
        other_sizes: more sizes that all its libraries resize it to.
    """

    name: str
    models: Mapping[str, Builder] = field(repr=False)
    size: tuple[int, int]
    other_sizes: tuple[tuple[int, int], ...] = ()

    def backbones(self) -> dict[str, Backbone]:
        """Build a backbone of each library that taps all layers, all with the same random weights."""
        built = {library: self._backbone(library) for library in self.models}
        first, *others = built.values()
        # As wide models are started: what blocks add is about as large as what comes in, at every width.
        randomise_parameters(first.model, std=0.7 / first.embed_dim**0.5)
        for before, other in zip([first, *others], others, strict=False):
            carry_weights(before.model, other.model)
        return built

    def _backbone(self, library: str) -> Backbone:
        torch.manual_seed(len(library))  # a weight that was not carried differs
        family: Any = BACKBONES.get(library)
        backbone: Backbone = family(self.models[library](), layers=ALL_LAYERS)
        return backbone.eval()

    def __str__(self) -> str:
        return self.name


def _clip(
    name: str, timm_name: str, act: str, *, edge: int, patch: int, width: int = WIDTH, heads: int = NUM_HEADS
) -> Architecture:
    grid = edge // patch
    return Architecture(
        name,
        {
            "open_clip": open_clip_model(
                quick_gelu=act == "quick_gelu",
                width=width,
                head_width=width // heads,
                patch_size=patch,
                image_size=edge,
            ),
            "timm": timm_model(timm_name, img_size=edge, patch_size=patch, embed_dim=width, num_heads=heads),
            "transformers": transformers_model(
                "clip_vision_model",
                hidden_size=width,
                num_attention_heads=heads,
                hidden_act=act,
                image_size=edge,
                patch_size=patch,
            ),
        },
        (edge, edge),
        (((grid + 2) * patch, (grid + 2) * patch), ((grid - 1) * patch, (grid + 3) * patch)),
    )


def _siglip(
    name: str,
    timm_name: str,
    *,
    edge: int,
    patch: int,
    width: int = WIDTH,
    heads: int = NUM_HEADS,
    timm_options: Mapping[str, Any] | None = None,
) -> Architecture:
    ratio = 3.7362
    sizes = {"img_size": edge, "patch_size": patch, "embed_dim": width, "num_heads": heads, "mlp_ratio": ratio}
    trunk = timm_model(timm_name, **sizes, **(timm_options or {}))
    return Architecture(
        name,
        {
            "open_clip": open_clip_timm_model(trunk),
            "timm": trunk,
            "transformers": transformers_model(
                "siglip_vision_model",
                hidden_size=width,
                num_attention_heads=heads,
                intermediate_size=int(width * ratio),
                image_size=edge,
                patch_size=patch,
            ),
        },
        (edge, edge),
        ((7 * patch, 4 * patch),),
    )


def _two(name: str, one: Builder, other: Builder, size: tuple[int, int], *other_sizes: tuple[int, int]) -> Architecture:
    """Describe an architecture of timm and transformers."""
    return Architecture(name, {"timm": one, "transformers": other}, size, other_sizes)


def _inside(name: str, timm_name: str, size: tuple[int, int]) -> Architecture:
    """Describe one of timm that open_clip takes from there."""
    model = timm_model(timm_name, img_size=size)
    return Architecture(name, {"open_clip": open_clip_timm_model(model), "timm": model}, size)


# In timm's SigLIP of most sizes, the activation is the exact GELU rather than its tanh approximation.
_TANH = {"act_layer": "gelu_tanh"}
_EPS = 1e-6  # timm's; those of transformers' ViT, DeiT, I-JEPA and BEiT are 1e-12

ARCHITECTURES = (
    _clip("CLIP (OpenAI, quick GELU)", "vit_large_patch14_clip_quickgelu_336", "quick_gelu", edge=70, patch=14),
    _clip("CLIP (LAION, GELU)", "vit_base_patch16_clip_224", "gelu", edge=64, patch=16, heads=4),
    # Three patches and a rest, as 384 pixels are 27 patches of 14 and a rest.
    _siglip("SigLIP", "vit_so400m_patch14_siglip_384", edge=45, patch=14, timm_options=_TANH),
    _siglip("SigLIP2", "vit_so400m_patch16_siglip_256", edge=64, patch=16, heads=4),
    _two(
        "SigLIP2 NaFlex",
        timm_model("naflexvit_so400m_patch16_siglip", pos_embed_grid_size=(4, 4), mlp_ratio=4.0),
        transformers_model("siglip2_vision_model", patch_size=16, num_patches=16),
        (64, 64),
        (48, 112),
        (32, 32),
    ),
    _inside("EVA02-CLIP", "eva02_large_patch14_clip_336", (70, 70)),
    _inside("EVA02-CLIP E (post-norm)", "eva02_enormous_patch14_clip_224", (42, 70)),
    _inside("Perception Encoder", "vit_pe_core_base_patch16_224", (48, 80)),
    _two(
        "DINOv2",
        timm_model("vit_large_patch14_dinov2", img_size=70),
        transformers_model("dinov2", image_size=70, patch_size=14),
        (70, 70),
        (98, 56),
    ),
    _two(
        "DINOv2 g (SwiGLU)",
        timm_model("vit_giant_patch14_dinov2", img_size=42),
        transformers_model("dinov2", image_size=42, patch_size=14, use_swiglu_ffn=True),
        (42, 42),
    ),
    _two(
        "DINOv2 with registers",
        timm_model("vit_small_patch14_reg4_dinov2", img_size=70),
        transformers_model("dinov2_with_registers", image_size=70, patch_size=14, num_register_tokens=4),
        (70, 70),
        (98, 56),
    ),
    _two(
        "DINOv3",
        timm_model("vit_base_patch16_dinov3_qkvb", img_size=64),
        transformers_model("dinov3_vit", image_size=64, patch_size=16, num_register_tokens=4),
        (64, 64),
        (48, 112),
    ),
    _two(
        "DINOv3 H+ (SwiGLU)",
        timm_model("vit_huge_plus_patch16_dinov3_qkvb", img_size=64),
        transformers_model(
            "dinov3_vit", image_size=64, patch_size=16, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"
        ),
        (64, 64),
        (112, 48),
    ),
    _two(
        "AIMv2",
        timm_model("aimv2_large_patch14_224", img_size=70),
        transformers_model("aimv2_vision_model", image_size=70, patch_size=14, intermediate_size=132),
        (70, 70),
    ),
    _two(
        "ViT",
        timm_model("vit_base_patch16_224", img_size=64),
        transformers_model("vit", image_size=64, patch_size=16, layer_norm_eps=_EPS),
        (64, 64),
        (48, 112),
    ),
    _two(
        "DeiT (distilled)",
        timm_model("deit_base_distilled_patch16_224", img_size=64),
        transformers_model("deit", image_size=64, patch_size=16, layer_norm_eps=_EPS),
        (64, 64),
        (48, 112),
    ),
    _two(
        "I-JEPA",
        timm_model("vit_huge_patch14_gap_224", img_size=70),
        transformers_model("ijepa", image_size=70, patch_size=14, layer_norm_eps=_EPS),
        (70, 70),
        (42, 98),
    ),
    _two(
        "InternViT",
        timm_model("vit_intern300m_patch14_448", img_size=70),
        transformers_model("internvl_vision", image_size=[70, 70], patch_size=[14, 14], attention_bias=True),
        (70, 70),
        (42, 98),
    ),
    _two(
        "BEiT",
        timm_model("beit_base_patch16_224", img_size=64),
        transformers_model("beit", image_size=64, patch_size=16, layer_norm_eps=_EPS, use_relative_position_bias=True),
        (64, 64),
        (48, 112),
    ),
)

# As configs are published, where that makes numbers differ: another activation, another epsilon of layer norms.
PUBLISHED = (
    _siglip("SigLIP", "vit_so400m_patch14_siglip_384", edge=45, patch=14),
    _two(
        "ViT",
        timm_model("vit_base_patch16_224", img_size=64),
        transformers_model("vit", image_size=64, patch_size=16),
        (64, 64),
    ),
    _two(
        "BEiT",
        timm_model("beit_base_patch16_224", img_size=64),
        transformers_model("beit", image_size=64, patch_size=16, use_relative_position_bias=True),
        (64, 64),
    ),
)

FULL_SIZE = (
    _clip(
        "CLIP ViT-L/14-336",
        "vit_large_patch14_clip_quickgelu_336",
        "quick_gelu",
        edge=336,
        patch=14,
        width=1024,
        heads=16,
    ),
    _siglip(
        "SigLIP so400m/14-384",
        "vit_so400m_patch14_siglip_384",
        edge=384,
        patch=14,
        width=1152,
        heads=16,
        timm_options=_TANH,
    ),
    _two(
        "DINOv2 ViT-L/14-518",
        timm_model("vit_large_patch14_dinov2", embed_dim=1024, num_heads=16),
        transformers_model("dinov2", hidden_size=1024, num_attention_heads=16, image_size=518, patch_size=14),
        (518, 518),
    ),
)
