"""The vision model that published checkpoints only name: find it, read it, and hold ours as transformers holds it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModel

from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from layerfuse.backbones import Backbone, create_backbone
from layerfuse.errors import InputError

from .content import TOKENIZER_FILES, Content, Options
from .key_maps import BACKBONE, from_llava_hf
from .tensors import CONFIG_FILE, StoredTensor, check_fit, stored_model

__all__ = [
    "backbone_like",
    "check_tower",
    "find_model",
    "find_tower",
    "split_tail",
    "tower_tensors",
    "vision_config_of",
    "vision_tensors_of",
    "whole_tower",
]

_log = logging.getLogger(__name__)
_DESCRIPTIONS = [CONFIG_FILE, "preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES]
# Hub repositories may have both kinds; the second is looked for only where the first is missing.
_WEIGHTS = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)
# Parts of a model of text and vision, such as CLIP, beside the vision model; and a table that models compute.
_OTHERS = re.compile(r"^(?:text_model\.|text_projection\.|visual_projection\.|logit_scale|logit_bias)|position_ids$")
_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
# Of CLIP, timm's name -> transformers'; `qkv`, and the two tables whose shape differs, are handled below.
_TIMM_RULES = (
    (re.compile(r"^patch_embed\.proj\."), "embeddings.patch_embedding."),
    (re.compile(r"^norm_pre\."), "pre_layrnorm."),
    (re.compile(r"^norm\."), "post_layernorm."),
    (re.compile(r"^blocks\.(\d+)\.norm([12])\."), r"encoder.layers.\1.layer_norm\2."),
    (re.compile(r"^blocks\.(\d+)\.attn\.proj\."), r"encoder.layers.\1.self_attn.out_proj."),
    (re.compile(r"^blocks\.(\d+)\.mlp\."), r"encoder.layers.\1.mlp."),
)
_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def find_tower(name: str, *, beside: Path, weights: bool) -> Path:
    """Folder of a vision model, as `find_model` finds it; `weights` says whether they are needed, too."""
    advice = (
        "Give the folder of the model, with config.json, preprocessor_config.json and weights: --vision-tower FOLDER"
    )
    return find_model(name, beside=beside, what="the vision model", advice=advice, weights=weights)


def find_model(name: str, *, beside: Path, what: str, advice: str, weights: bool = True) -> Path:
    """Folder of a model: one that exists, beside or in the checkpoint's or anywhere, or a copy from the hub.

    Args:
        name: folder or hub name, as a checkpoint has it.
        beside: folder of the checkpoint.
        what: kind of the model, for the message.
        advice: what to give where it is not to be had.
        weights: whether its weights are needed, too.

    Raises:
        ValueError: if it is in none of these places; the message says what to give.
    """
    for folder in (beside / name, beside.parent / name, Path(name)):
        if (folder / CONFIG_FILE).is_file():
            return folder
    try:
        folder = Path(snapshot_download(name, allow_patterns=_DESCRIPTIONS))
        if weights:
            for patterns in _WEIGHTS:
                folder = Path(snapshot_download(name, allow_patterns=[*_DESCRIPTIONS, *patterns]))
                if any((folder / pattern.replace("*", "")).is_file() for pattern in patterns):
                    break
    except (OSError, ValueError) as error:
        raise InputError(
            f"{what} {name!r} is no folder beside the checkpoint and cannot be got from the hub "
            f"({type(error).__name__}). {advice}."
        ) from error
    return folder


def backbone_like(folder: Path, layers: tuple[int, ...]) -> Backbone:
    """Backbone on the meta device, as the config in a folder describes it or a model that contains it.

    Raises:
        ValueError: if layerfuse cannot tap such a model.
    """
    with torch.device("meta"):
        return create_backbone(f"transformers:{folder}", layers=layers, pretrained=False)


def tower_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Weights of a whole vision model, under our names, from its folder, or that of a CLIP or of transformers' LLaVA.

    Raises:
        FileNotFoundError: if the folder holds no weights.
        ValueError: if they cannot be read.
    """
    stored = stored_model(folder)
    if any("vision_tower." in name for name in stored):
        renamed = from_llava_hf(stored)
        return {name: tensor for name, tensor in renamed.items() if name.startswith(BACKBONE)}
    return {
        BACKBONE + name.removeprefix("vision_model."): tensor
        for name, tensor in stored.items()
        if not _OTHERS.search(name)
    }


def vision_config_of(backbone: Backbone) -> dict[str, Any]:
    """Transformers' config of a backbone of the families transformers and timm (CLIP only), with all its layers.

    Raises:
        ValueError: if transformers has no such model, or the backbone takes another size than its model.
    """
    if backbone.family == "timm":
        return _clip_config_of_timm(backbone)
    if backbone.family != "transformers":
        raise InputError(
            f"the backbone is of family {backbone.family!r}, whose weights the other layouts have no names for; they "
            "hold vision models of transformers, and CLIP as timm has it."
        )
    config: dict[str, Any] = backbone.config["recipe"]["config"]
    own = config["image_size"]
    if list(backbone.image_size) != ([own, own] if isinstance(own, int) else list(own)):
        raise InputError(
            f"the backbone takes images of {backbone.image_size}, its vision model {own}; the other layouts know no "
            "such difference."
        )
    return dict(config)


def vision_tensors_of(backbone: Backbone, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Weights of a backbone, up to its deepest tapped layer, as transformers holds them, out of those of our model.

    Raises:
        ValueError: as `vision_config_of`.
    """
    vision_config_of(backbone)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}
    return _clip_tensors_of_timm(own) if backbone.family == "timm" else own


def split_tail(
    model: FusedLlavaForConditionalGeneration, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """All weights but the vision model's behind the deepest tapped layer, where our model ends, and those behind it."""
    behind = _tower_on_meta(vision_config_of(model.model.vision_tower.backbone)).keys() - model.state_dict().keys()
    tail = {name: tensor for name, tensor in tensors.items() if name in behind}
    return {name: tensor for name, tensor in tensors.items() if name not in tail}, tail


def whole_tower(content: Content, vision_config: Mapping[str, Any], options: Options) -> dict[str, StoredTensor]:
    """Weights of the whole vision model; those that the content lacks are read from `options.vision_tower`.

    Raises:
        ValueError: if the rest is not to be had, or does not fit.
    """
    whole = _tower_on_meta(vision_config)
    found = {**content.tail, **vision_tensors_of(content.backbone, content.tensors)}
    name = options.vision_tower or (content.origin.config.get("mm_vision_tower") if content.origin else None)
    if whole.keys() - found.keys() and name is not None:
        found = {**tower_tensors(find_tower(name, beside=content.folder, weights=True)), **found}
    check_fit(
        whole,
        found,
        fault="the layout holds the whole vision model, but ours ends at its deepest tapped layer",
        advice="Give the vision model that it was trained with: --vision-tower FOLDER_OR_NAME",
        most=20,
    )
    return {key: found[key] for key in whole}


def check_tower(name: str, tensors: Mapping[str, StoredTensor], *, beside: Path) -> None:
    """Compare a backbone, as transformers holds it, with the vision model that the published code reads instead.

    Raises:
        ValueError: if they differ: then the published code would compute something else, in silence.
    """
    try:
        named = tower_tensors(find_tower(name, beside=beside, weights=True))
    except (FileNotFoundError, ValueError):
        _log.warning("%s is not to be had here, so it was not checked that its weights are the model's", name)
        return
    other = [
        key.removeprefix(BACKBONE)
        for key, tensor in tensors.items()
        if key not in named
        or named[key].shape != tensor.shape
        or not torch.equal(named[key].read().to(tensor.dtype), tensor.read())
    ]
    if other:
        raise InputError(
            f"the vision model {name} is not the one in this model ({len(other)} weights differ: {', '.join(other[:3])}"
            ", …), and the published code reads the named one. Name the vision model it was trained with; one that was "
            "trained along cannot be given to the published code."
        )


def _tower_on_meta(vision_config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model: Any = AutoModel.from_config(AutoConfig.for_model(**vision_config))
    return {BACKBONE + name: tensor for name, tensor in model.state_dict().items()}


def _clip_config_of_timm(backbone: Backbone) -> dict[str, Any]:
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


def _clip_tensors_of_timm(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Weights of a backbone that `_clip_config_of_timm` takes, under our names, as transformers' CLIP holds them."""
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
            for pattern, replacement in _TIMM_RULES:
                inner = pattern.sub(replacement, inner)
            renamed[BACKBONE + inner] = tensor
    return renamed


def _third(index: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(3)[index].clone()
