"""Models of the three libraries in given sizes, with random weights; tiny unless said otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["NUM_BLOCKS", "Builder", "open_clip_model", "open_clip_timm_model", "timm_model", "transformers_model"]

Builder = Callable[[], nn.Module]

NUM_BLOCKS = 4
WIDTH = 48
NUM_HEADS = 3


def timm_model(name: str, **options: Any) -> Builder:
    """Return a builder of a timm model; ``options`` are its constructor's."""

    def build() -> nn.Module:
        import timm

        sizes = {"embed_dim": WIDTH, "depth": NUM_BLOCKS, "num_heads": NUM_HEADS}
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **{**sizes, **options})
        return model

    return build


def open_clip_model(*, quick_gelu: bool = False, **options: Any) -> Builder:
    """Return a builder of the vision tower that is open_clip's own; ``options`` are fields of its CLIPVisionCfg."""

    def build() -> nn.Module:
        import open_clip

        sizes = {"width": WIDTH, "layers": NUM_BLOCKS, "head_width": WIDTH // NUM_HEADS}
        text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
        vision = open_clip.CLIPVisionCfg(**{**sizes, **options})
        model: nn.Module = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).visual
        return model

    return build


def open_clip_timm_model(trunk: Builder) -> Builder:
    """Return a builder of open_clip's vision tower with a timm model inside."""

    def build() -> nn.Module:
        from open_clip.timm_model import TimmModel

        tower: nn.Module = TimmModel("test_vit", embed_dim=8, image_size=32, pool="", proj="none")
        tower.trunk = trunk()
        return tower

    return build


def transformers_model(kind: str, **options: Any) -> Builder:
    """Return a builder of a vision model of transformers; ``options`` are fields of its config."""

    def build() -> nn.Module:
        from transformers import AutoConfig, AutoModel

        width = options.get("hidden_size", WIDTH)
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": NUM_BLOCKS, "num_attention_heads": NUM_HEADS}
        config = AutoConfig.for_model(kind, **{**sizes, "intermediate_size": 4 * width, **options})
        model: nn.Module = AutoModel.from_config(config)
        return model

    return build
