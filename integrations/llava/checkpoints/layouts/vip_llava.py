"""The layout of transformers' VipLlava (ViP-LLaVA, arXiv:2312.00784): several layers, side by side and normalised.

Its projector begins with a LayerNorm over the concatenated layers, which here is the fuser: `concat` with `norm`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, VipLlavaConfig

from layerfuse.backbones import Backbone
from layerfuse.errors import InputError
from layerfuse.fusers import Fuser, create_fuser
from layerfuse.layers import resolve_layers

from ..content import Content, Options, reading, refuse_injection
from ..vision_weights import backbone_like
from .llava_hf import content_of, shared_fields, write_content

__all__ = ["VIP_LLAVA", "read_vip_llava", "write_vip_llava"]

_log = logging.getLogger(__name__)

VIP_LLAVA = "vip-llava"
"""Name of the layout."""
_FUSER: Mapping[str, Any] = {"norm": "layer", "order": "blocks", "resize": None, "out_channels": None}


def read_vip_llava(folder: Path, config: Mapping[str, Any], options: Options) -> Content:
    """Read a checkpoint of transformers' VipLlava, whatever version wrote it; errors are those of `read_published`."""
    with reading(f"the config of {folder}"):
        described = AutoConfig.from_pretrained(folder)
    assert isinstance(described, VipLlavaConfig)
    if options.template is None:
        _log.info(
            "such checkpoints do not hold their prompt template; taking v1, vicuna's (--template). Those on the hub "
            "are asked with roles behind '###', which is no template here"
        )
    backbone = backbone_like(folder, _layers(described))
    _check(described, backbone)
    with torch.device("meta"):
        fuser = create_fuser(
            "concat",
            in_channels=backbone.embed_dim,
            num_layers=len(backbone.layers),
            options={"norm": "layer", "norm_eps": described.projector_layernorm_eps},
        )
    return content_of(folder, config, options, VIP_LLAVA, described=described, backbone=backbone, fuser=fuser)


def _layers(config: VipLlavaConfig) -> tuple[int, ...]:
    # transformers 5.17 knows only this name; later ones take it for their vision_feature_layer.
    layers: Any = config.vision_feature_layers
    return (layers,) if isinstance(layers, int) else tuple(layers)


def _check(config: VipLlavaConfig, backbone: Backbone) -> None:
    faults = []
    # transformers leaves out the first token of each map, whatever it is.
    if backbone.num_prefix_tokens != 1:
        faults.append(f"the vision model has {backbone.num_prefix_tokens} tokens in front of the patches, expected one")
    if config.projector_hidden_act != "gelu":
        faults.append(f"projector_hidden_act is {config.projector_hidden_act!r}, expected 'gelu'")
    if faults:
        raise InputError(f"this checkpoint is no ViP-LLaVA: {'; '.join(faults)}. Only those can be converted.")


def write_vip_llava(content: Content, folder: Path, options: Options) -> None:
    """Write a checkpoint for `VipLlavaForConditionalGeneration` into a folder that exists.

    Layers of the vision model behind the tapped ones come from the model's origin, or else from
    `options.vision_tower`.

    Raises:
        ValueError: if the fuser is not `concat` with its norm, there is layer injection, the head does more than a
            product, or the vision model is not to be had whole.
    """
    refuse_injection(content, VIP_LLAVA)
    backbone, norm = content.backbone, _norm_of(content.fuser)
    if backbone.num_prefix_tokens != 1:
        raise InputError(
            f"the vision model has {backbone.num_prefix_tokens} tokens in front of the patches; transformers' VipLlava "
            "leaves out exactly one. Keep our own layout, 'layerfuse', which holds this model as it is."
        )
    layers: int | list[int] = [layer - backbone.num_blocks - 1 for layer in backbone.layers]
    if content.origin is not None and content.origin.layout == VIP_LLAVA:
        # The same layers, as they were written there: some of the last ones, some of the first.
        came = VipLlavaConfig(**content.origin.config)
        if resolve_layers(_layers(came), backbone.num_blocks) == backbone.layers:
            layers = came.vision_feature_layers
    fields = {
        **shared_fields(content),
        "vision_feature_layers": layers,
        "projector_layernorm_eps": norm.eps,
        "architectures": ["VipLlavaForConditionalGeneration"],
    }
    config = VipLlavaConfig(**fields, image_seq_length=content.model.config.layout.num_tokens())
    write_content(content, folder, options, VIP_LLAVA, config)


def _norm_of(fuser: Fuser) -> nn.LayerNorm:
    other = {key: fuser.config.get(key) for key, value in _FUSER.items() if fuser.config.get(key, value) != value}
    norm = getattr(fuser, "norm", None)
    if fuser.name == "concat" and not other and isinstance(norm, nn.LayerNorm):
        return norm
    settings = {key: value for key, value in fuser.config.items() if key not in ("name", "num_layers", "in_channels")}
    raise InputError(
        f"the model has the fuser {fuser.name!r} over {fuser.num_layers} layers with {settings or 'no settings'}; "
        f"transformers' VipLlava has only 'concat' with {dict(_FUSER)}. Keep our own layout, 'layerfuse', which holds "
        "this model as it is."
    )
