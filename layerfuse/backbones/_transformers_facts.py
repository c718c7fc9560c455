"""Facts about the vision models of transformers, and how each is called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from layerfuse.backbones._transformers_stages import STAGED, stage_facts
from layerfuse.backbones.base import BackboneFacts, as_pair
from layerfuse.errors import InputError
from layerfuse.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Mode,
    Preprocessing,
    interpolation_name,
)
from layerfuse.taps import find_blocks

__all__ = [
    "known_types",
    "read_preprocessing",
    "takes",
    "transformers_facts",
    "vision_part",
]

# Where the blocks are: names moved between major versions, so the first of these with the right length counts.
_BLOCK_PATHS = ("encoder.layers", "encoder.layer", "model.layer", "layers", "layer", "vision_model.encoder.layers")
# Class tokens before the patches; models with register tokens say so in their config.
CLASS_TOKENS = {
    "beit": 1,
    "clip_vision_model": 1,
    "deit": 2,  # a token of distillation, too
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "internvl_vision": 1,
    "mlcd_vision_model": 1,
    "mlcd": 1,
    "vit": 1,
    "aimv2_vision_model": 0,
    "ijepa": 0,
    "siglip2_vision_model": 0,
    "siglip_vision_model": 0,
}
# These resize position embeddings (or have rotary ones) without being told.
_RESIZE_THEMSELVES = (
    *("dinov2", "dinov2_with_registers", "dinov3_vit", "internvl_vision", "siglip2_vision_model"),
    *("mlcd", "mlcd_vision_model"),
)
# Statistics and resize for a checkpoint without preprocessor_config.json, as the released models have them.
_CLIP_LIKE: tuple[Any, ...] = (CLIP_MEAN, CLIP_STD, "bicubic", "crop", 1.0)
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "clip_vision_model": _CLIP_LIKE,
    "mlcd_vision_model": _CLIP_LIKE,
    "mlcd": _CLIP_LIKE,
    "aimv2_vision_model": _CLIP_LIKE,
    "siglip_vision_model": (HALF, HALF, "bicubic", "squash", 1.0),
    "siglip2_vision_model": (HALF, HALF, "bilinear", "squash", 1.0),
    "vit": (HALF, HALF, "bilinear", "squash", 1.0),
    "beit": (HALF, HALF, "bilinear", "squash", 1.0),
    "ijepa": (HALF, HALF, "bilinear", "squash", 1.0),
    "dinov3_vit": (IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash", 1.0),
    "internvl_vision": (IMAGENET_MEAN, IMAGENET_STD, "bicubic", "squash", 1.0),
    "sam_vision_model": (IMAGENET_MEAN, IMAGENET_STD, "bilinear", "pad", 1.0),
    "sam2_hiera_det_model": (IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash", 1.0),
    "swin": (IMAGENET_MEAN, IMAGENET_STD, "bicubic", "squash", 1.0),
    "swinv2": (IMAGENET_MEAN, IMAGENET_STD, "bicubic", "squash", 1.0),
}
_DEFAULT: tuple[Any, ...] = (IMAGENET_MEAN, IMAGENET_STD, "bicubic", "crop", 224 / 256)


def transformers_facts(model: nn.Module) -> BackboneFacts:
    """Read the facts, with the preprocessing of the released models, from a vision model such as CLIPVisionModel.

    Raises:
        ValueError: if the number of class tokens of this model type is not known, or it has no list of blocks.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind == "vit_mae":
        raise InputError(
            "transformers' ViT-MAE shuffles its patches and drops most of them in every call, in eval mode and with "
            "mask_ratio=0 too, so its maps have no grid. Its weights load into a plain Vision Transformer: hand over "
            "transformers.ViTModel.from_pretrained(name), or take timm's 'vit_base_patch16_224.mae'."
        )
    if kind in STAGED:
        facts = stage_facts(config)
        preprocessing = read_preprocessing({}, kind=kind, size=facts["image_size"])
        return BackboneFacts(preprocessing=preprocessing, in_channels=getattr(config, "num_channels", None), **facts)
    if kind not in CLASS_TOKENS:
        raise InputError(
            f"transformers model type {kind!r} is unknown to layerfuse; known: {', '.join(known_types())}. Tap "
            "another one as ModuleBackbone(model, ...), which is told the number of prefix tokens and the patch size."
        )
    patch_size = as_pair(config.patch_size)
    if takes(model, "spatial_shapes"):  # no image size, but a square of position embeddings
        embeddings: Any = model.embeddings
        edge = embeddings.position_embedding_size
        image_size = (edge * patch_size[0], edge * patch_size[1])
    else:
        image_size = as_pair(config.image_size)
    native_aimv2 = kind == "aimv2_vision_model" and bool(config.is_native)
    return BackboneFacts(
        blocks=_block_path(model, config.num_hidden_layers),
        embed_dim=config.hidden_size,
        num_prefix_tokens=CLASS_TOKENS[kind] + getattr(config, "num_register_tokens", 0),
        patch_size=patch_size,
        image_size=image_size,
        any_size=kind in _RESIZE_THEMSELVES or takes(model, "interpolate_pos_encoding") or native_aimv2,
        preprocessing=read_preprocessing({}, kind=kind, size=image_size),
        in_channels=getattr(config, "num_channels", None),
        patch_layout="height width channels" if takes(model, "spatial_shapes") else None,
    )


def known_types() -> list[str]:
    """Return the model types that are known, such as ``"clip_vision_model"``."""
    return sorted((*CLASS_TOKENS, *STAGED))


def vision_part(model: nn.Module) -> nn.Module:
    """Return the vision model in one that holds it (CLIPModel, SiglipModel, an image classifier, LLaVA).

    It is what `AutoModel` would build for a vision config: no text model, no classifier.
    """
    from transformers import MODEL_MAPPING

    for name in ("vision_model", "vision_encoder"):  # the second is SAM's
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and hasattr(inner, "config"):
            return inner
    config: Any = getattr(model, "config", None)
    built: Any = MODEL_MAPPING.get(type(getattr(config, "vision_config", config)), nn.Module)
    return next((module for module in model.modules() if isinstance(module, built)), model)


def takes(model: nn.Module, argument: str) -> bool:
    """Tell whether a model's ``forward`` has an argument."""
    return argument in inspect.signature(model.forward).parameters


def read_preprocessing(config: Mapping[str, Any], *, kind: str, size: tuple[int, int]) -> Preprocessing:
    """Translate a ``preprocessor_config.json`` for a model that takes ``size``, (height, width) in pixels.

    Keys that are missing come from the released models of that type.
    """
    mean, std, interpolation, mode, crop_pct = _DEFAULTS.get(kind, _DEFAULT)
    resize = config.get("size")
    if isinstance(resize, (Mapping, int)):
        mode, crop_pct = _resize_mode(resize, config, mode)
    if config.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Preprocessing(
        size=size,
        mean=tuple(config.get("image_mean", mean)),
        std=tuple(config.get("image_std", std)),
        interpolation=interpolation_name(config.get("resample", interpolation)),
        mode=mode,
        crop_pct=crop_pct,
    )


def _resize_mode(resize: Mapping[str, int] | int, config: Mapping[str, Any], default: Mode) -> tuple[Mode, float]:
    if config.get("do_pad") is True:
        return "pad", 1.0
    edge = resize if isinstance(resize, int) else resize.get("shortest_edge")
    if edge is None:
        return "squash", 1.0
    crops = config.get("do_center_crop", default == "crop")
    if isinstance(resize, int) and not crops:
        return "squash", 1.0
    crop = config.get("crop_size", edge)
    crop_edge = min(crop.values()) if isinstance(crop, Mapping) else crop
    return "crop", min(1.0, crop_edge / edge)


def _block_path(model: nn.Module, num_hidden_layers: int) -> str:
    for path in _BLOCK_PATHS:
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList) and len(blocks) == num_hidden_layers:
            return path
    return find_blocks(model)
