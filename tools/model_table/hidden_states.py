"""Each library's own way of giving the hidden states of all layers, which taps are held against.

A function takes a whole model and images, and gives the layers 0, 1, … to the last block, each (B, P + N, C), before
any final norm; of a model with stages, maps (B, C, H, W) of those layers that the library has a way to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch

__all__ = [
    "beit_hidden_states",
    "hugging_face_hidden_states",
    "maps_before_the_norm",
    "naflex_hidden_states",
    "open_clip_hidden_states",
    "siglip2_hidden_states",
    "stage_maps",
    "timm_hidden_states",
]


def timm_hidden_states(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the hidden states of a plain ViT of timm."""
    # timm has no name for what enters block 1; these are the lines of its forward_features before the blocks.
    embedded = model._pos_embed(model.patch_embed(images))
    embedded = embedded[0] if isinstance(embedded, tuple) else embedded
    embedded = model.norm_pre(embedded) if hasattr(model, "norm_pre") else embedded
    return [embedded, *_timm_blocks(model, images)]


def beit_hidden_states(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the hidden states of timm's BEiT."""
    patches = model.patch_embed(images)
    embedded = torch.cat([model.cls_token.expand(len(images), -1, -1), patches], dim=1)
    return [embedded if model.pos_embed is None else embedded + model.pos_embed, *_timm_blocks(model, images)]


def naflex_hidden_states(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the hidden states of timm's NaFlexVit."""
    return [model.norm_pre(model.embeds(images)[0]), *_timm_blocks(model, images)]


def _timm_blocks(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    found = model.forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC")
    return [torch.cat([item[1], item[0]], dim=1) if isinstance(item, tuple) else item for item in found]


def open_clip_hidden_states(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the hidden states of a vision tower of open_clip."""
    found = model.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True, intermediates_only=True)
    maps = found["image_intermediates"]
    prefix = found.get("image_intermediates_prefix", [maps[0][:, :0]] * len(maps))
    blocks = [torch.cat(pair, dim=1) for pair in zip(prefix, maps, strict=True)]
    embedded = timm_hidden_states(model.trunk, images)[0] if hasattr(model, "trunk") else model._embeds(images)
    return [embedded, *blocks]


def hugging_face_hidden_states(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the hidden states of a vision model of transformers."""
    return list(model(images, output_hidden_states=True).hidden_states)


def siglip2_hidden_states(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the hidden states of transformers' SigLIP2, which takes patches."""
    # The image processor's own function cuts the patches.
    import numpy as np
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    edge = model.config.patch_size
    rows, columns = images.shape[2] // edge, images.shape[3] // edge
    patches = torch.from_numpy(np.stack([convert_image_to_patches(image.numpy(), edge) for image in images]))
    outputs = model(
        patches,
        pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
        spatial_shapes=torch.tensor([[rows, columns]] * len(images)),
        output_hidden_states=True,
    )
    return list(outputs.hidden_states)


def stage_maps(model: Any, images: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the maps of timm's windowed and hierarchical models."""
    of_blocks: Mapping[str, Any] = {}
    if "coarse" in inspect.signature(model.forward_intermediates).parameters:
        of_blocks = {"coarse": False}
    found = model.forward_intermediates(images, intermediates_only=True, **of_blocks)
    stages = getattr(model, "layers", getattr(model, "stages", None))
    ends = range(1, len(found) + 1) if stages is None else accumulate(len(stage.blocks) for stage in stages)
    return dict(zip(ends, found, strict=True))


def maps_before_the_norm(model: Any, images: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the maps of timm's PVT v2."""
    # PVT normalises each map behind the blocks of its stage, and gives no other.
    found: dict[int, torch.Tensor] = {}
    ends = list(accumulate(len(stage.blocks) for stage in model.stages))
    edges = [images.shape[2] // info["reduction"] for info in model.feature_info]

    def keep(end: int, edge: int) -> Callable[..., None]:
        return lambda module, args: found.update({end: args[0].transpose(1, 2).unflatten(2, (edge, edge))})

    hooks = [
        stage.norm.register_forward_pre_hook(keep(end, edge))
        for stage, end, edge in zip(model.stages, ends, edges, strict=True)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found
