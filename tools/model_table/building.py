"""Models of the table's backbones, cut to four blocks, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerfuse.backbones import Backbone, create_backbone
from layerfuse.testing import randomise_parameters
from tools.model_table import hidden_states
from tools.model_table.backbones import BackboneRow

__all__ = ["backbone_of", "hidden_states_of", "library_model", "published_backbone"]

# Small enough that no model ends far from where rounding matters, large enough that each parameter does.
_STD = 0.02
_CHANNELS = {"timm": "in_chans", "open_clip": "in_chans", "transformers": "num_channels"}


def published_backbone(row: BackboneRow) -> Backbone:
    """Return the whole architecture on the meta device: it says sizes, and computes nothing."""
    with torch.device("meta"):
        return create_backbone(f"{row.family}:{row.name}", layers=(1, -1), pretrained=False, options=row.options)


def library_model(row: BackboneRow, **changed: Any) -> nn.Module:
    """Return the library's own model of four blocks, before layerfuse has seen it."""
    options = {**row.options, **row.scaled, **row.cut, **changed}
    torch.manual_seed(0)
    build = {"timm": _timm_model, "open_clip": _open_clip_tower, "transformers": _transformers_model}[row.family]
    return randomise_parameters(build(row.name, options), std=_STD).eval()


def _timm_model(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    return model


def _transformers_model(name: str, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    model: nn.Module = AutoModel.from_config(AutoConfig.for_model(name, **options))
    return model


def _open_clip_tower(name: str, options: dict[str, Any]) -> nn.Module:
    import open_clip

    config = open_clip.get_model_config(name)
    vision, timm_name = dict(config["vision_cfg"]), config["vision_cfg"].get("timm_model_name")
    if timm_name is not None:
        # open_clip hands no depth to timm: a tower of its smallest model gets the trunk that is wanted.
        trunk = _timm_model(timm_name, {"depth": options.pop("layers"), "img_size": vision["image_size"], **options})
        tower = open_clip.timm_model.TimmModel("test_vit", embed_dim=8, image_size=160, pool="", proj="none")
        tower.trunk = trunk
        return tower
    text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg={**vision, **options},
        text_cfg=text,
        quick_gelu=config.get("quick_gelu", False),
    )
    visual: nn.Module = clip.visual
    return visual


def backbone_of(
    row: BackboneRow, *, image_size: tuple[int, int] | None = None, channels: int | None = None
) -> Backbone:
    """Return the backbone of a row as a user builds it, for another size or number of channels if asked."""
    changed = {} if channels is None else {_CHANNELS[row.family]: channels}
    if row.family == "open_clip" and _holds_timm(row.name):
        backbone = create_backbone(library_model(row, **changed), layers=row.tapped, image_size=image_size)
    else:
        options = {**row.options, **row.scaled, **row.cut, **changed}
        torch.manual_seed(0)
        backbone = create_backbone(
            f"{row.family}:{row.name}", layers=row.tapped, pretrained=False, image_size=image_size, options=options
        )
    randomise_parameters(backbone, std=_STD)
    return backbone


def _holds_timm(name: str) -> bool:
    import open_clip

    return "timm_model_name" in open_clip.get_model_config(name)["vision_cfg"]


def hidden_states_of(row: BackboneRow, model: nn.Module, images: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return what the model's library gives as hidden states, (B, P + N, C) by layer."""
    if row.is_staged:
        normed = type(model).__name__ == "PyramidVisionTransformerV2"
        maps = (hidden_states.maps_before_the_norm if normed else hidden_states.stage_maps)(model, images)
        return {layer: each.flatten(2).transpose(1, 2) for layer, each in maps.items()}
    kinds = {
        "Beit": hidden_states.beit_hidden_states,
        "NaFlexVit": hidden_states.naflex_hidden_states,
        "Siglip2VisionModel": hidden_states.siglip2_hidden_states,
    }
    families = {
        "timm": hidden_states.timm_hidden_states,
        "open_clip": hidden_states.open_clip_hidden_states,
        "transformers": hidden_states.hugging_face_hidden_states,
    }
    return dict(enumerate(kinds.get(type(model).__name__, families[row.family])(model, images)))
