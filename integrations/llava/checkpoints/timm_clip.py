"""CLIP's vision transformer of timm as transformers holds it: the same weights, q, k and v apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from layerfuse.backbones import Backbone
from layerfuse.errors import InputError

from .key_maps import BACKBONE
from .tensors import StoredTensor

__all__ = ["clip_config_of_timm", "clip_tensors_of_timm"]

_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
# timm's name -> transformers' name; `qkv`, and the two tables whose shape differs, are handled below.
_RULES = (
    (re.compile(r"^patch_embed\.proj\."), "embeddings.patch_embedding."),
    (re.compile(r"^norm_pre\."), "pre_layrnorm."),
    (re.compile(r"^norm\."), "post_layernorm."),
    (re.compile(r"^blocks\.(\d+)\.norm([12])\."), r"encoder.layers.\1.layer_norm\2."),
    (re.compile(r"^blocks\.(\d+)\.attn\.proj\."), r"encoder.layers.\1.self_attn.out_proj."),
    (re.compile(r"^blocks\.(\d+)\.mlp\."), r"encoder.layers.\1.mlp."),
)
_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def clip_config_of_timm(backbone: Backbone) -> dict[str, Any]:
    """Fields of CLIPVisionConfig for a timm backbone, with all its blocks; a ValueError if it is no CLIP."""
    model: Any = backbone.model
    block = model.blocks[0]
    activation = _ACTIVATIONS.get(type(block.mlp.act).__name__)
    is_clip = (
        type(model).__name__ == "VisionTransformer"
        and isinstance(model.norm_pre, nn.LayerNorm)
        and isinstance(block.attn.q_norm, nn.Identity)
        and backbone.num_prefix_tokens == 1
        and activation is not None
        and len({*backbone.image_size}) == len({*backbone.patch_size}) == 1
    )
    if not is_clip:
        raise InputError(
            f"the backbone is timm's {backbone.config['recipe']['name']!r}, which is no CLIP vision transformer; the "
            "other layouts hold vision models of transformers, and of timm's only CLIP is one of them."
        )
    return {
        "model_type": "clip_vision_model",
        "hidden_size": backbone.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": backbone.num_blocks,
        "num_attention_heads": block.attn.num_heads,
        "image_size": backbone.image_size[0],
        "patch_size": backbone.patch_size[0],
        "hidden_act": activation,
        "layer_norm_eps": block.norm1.eps,
    }


def clip_tensors_of_timm(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Weights of a backbone that `clip_config_of_timm` takes, under our names, as transformers' CLIP holds them."""
    renamed = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(BACKBONE)
        split = _QKV.match(inner)
        if split:
            width = tensor.shape[0] // 3
            for index, part in enumerate("qkv"):
                shape = (width, *tensor.shape[1:])
                key = f"encoder.layers.{split[1]}.self_attn.{part}_proj.{split[2]}"
                renamed[BACKBONE + key] = tensor.then(partial(_third, index), shape)
        elif inner == "cls_token":
            renamed[f"{BACKBONE}embeddings.class_embedding"] = tensor.then(torch.flatten, tensor.shape[2:])
        elif inner == "pos_embed":
            table = f"{BACKBONE}embeddings.position_embedding.weight"
            renamed[table] = tensor.then(torch.squeeze, tensor.shape[1:])
        else:
            for pattern, replacement in _RULES:
                inner = pattern.sub(replacement, inner)
            renamed[BACKBONE + inner] = tensor
    return renamed


def _third(index: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(3)[index].clone()
