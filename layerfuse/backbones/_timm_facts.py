"""Facts about timm's Vision Transformers, for the two families whose models hold one: timm and open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from layerfuse.backbones._timm_stages import STAGED, stage_facts
from layerfuse.backbones.base import BackboneFacts, as_pair, checked_multiple
from layerfuse.errors import InputError
from layerfuse.preprocessing import Mode, PatchLayout, Preprocessing, interpolation_name

__all__ = ["cut_timm_tail", "preprocessing_of", "resize_timm_model", "timm_facts"]

_CROP_MODES: dict[str, Mode] = {"center": "crop", "squash": "squash", "border": "border"}


def timm_facts(model: Any, *, path: str = "") -> BackboneFacts:
    """Return the facts of a timm model: a plain Vision Transformer, or a windowed or hierarchical one.

    ``path`` is where it lies inside the module that is tapped, ending in a dot.

    Raises:
        ValueError: if this is no Vision Transformer whose blocks are known to give maps.
    """
    from timm.data import resolve_model_data_config

    modules = (each.__module__.rpartition(".") for each in type(model).__mro__)
    kind = next((name for package, _, name in modules if package == "timm.models" and name in STAGED), None)
    if kind is not None:
        facts = stage_facts(model, kind, path)
        preprocessing = preprocessing_of(resolve_model_data_config(model), facts["image_size"])
        return BackboneFacts(preprocessing=preprocessing, **facts)
    blocks = getattr(model, "blocks", None)
    plain = isinstance(blocks, (nn.ModuleList, nn.Sequential)) and hasattr(model, "num_prefix_tokens")
    # TNT and XCiT have blocks of other shapes behind embeddings without a grid.
    plain = plain and (hasattr(model, "embeds") or hasattr(getattr(model, "patch_embed", None), "grid_size"))
    if not plain or not hasattr(model, "reset_classifier"):
        raise InputError(
            f"{type(model).__name__} is no Vision Transformer with one list of blocks over (B, P + N, C) tokens, so "
            "layerfuse cannot tap it as a timm backbone; use a VisionTransformer, Eva, Beit or NaFlexVit model (CLIP, "
            "SigLIP, EVA02, DINOv2, DINOv3, AIMv2, PE, BEiT), a windowed or hierarchical one (Swin, Hiera, SAM, "
            "MViT V2, PVT V2), or the 'module' family if its blocks do return tokens."
        )
    patch_size, image_size, any_size = _geometry(model)
    return BackboneFacts(
        blocks=f"{path}blocks",
        embed_dim=model.embed_dim,
        num_prefix_tokens=model.num_prefix_tokens,
        patch_size=patch_size,
        image_size=image_size,
        any_size=any_size,
        preprocessing=preprocessing_of(resolve_model_data_config(model), image_size),
        # NaFlexVit's embedding is a linear layer over flat patches.
        in_channels=getattr(getattr(model, "embeds", None), "in_chans", None),
        patch_layout=None if path else _patch_layout(model),
    )


def resize_timm_model(model: nn.Module, facts: BackboneFacts, image_size: tuple[int, int]) -> BackboneFacts:
    """Make a timm model take another size, with timm's own resampling of position embeddings, and return its new facts.

    Raises:
        ValueError: if the size is no multiple of the patch size, or the model cannot be resized.
    """
    if image_size == facts.image_size:
        return facts
    checked_multiple(image_size, facts)
    setter = getattr(model, "set_input_size", None)
    if setter is not None:
        setter(img_size=image_size)
    elif not facts.any_size:
        raise InputError(
            f"{type(model).__name__} takes only {facts.image_size[0]}x{facts.image_size[1]} pixels and has no "
            f"set_input_size, so image_size={image_size} is not possible; leave image_size out, or build the "
            "model for that size: its constructor's img_size, of a name options={'img_size': …}."
        )
    return replace(facts, image_size=image_size, preprocessing=replace(facts.preprocessing, size=image_size))


def cut_timm_tail(model: Any) -> None:
    """Cut final norm, pooling and classifier off a model, so that its ``forward`` ends with the last block's tokens."""
    try:
        model.reset_classifier(0, "")
    except AttributeError:
        # Some heads hold the pooling; nn.Identity in their place (an earlier backbone's, or the user's) pools nothing.
        if not isinstance(getattr(model, "head", None), nn.Identity):
            raise
    # Some heads have a norm of their own; SAM's neck makes one map of another width.
    whole = next(model.head.parameters(), None) is not None if hasattr(model, "head") else False
    for name in ("norm", "fc_norm", "head_drop", "neck", *(("head",) if whole else ())):
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity())


def _geometry(model: Any) -> tuple[tuple[int, int], tuple[int, int], bool]:
    if hasattr(model, "embeds"):  # NaFlexVit: patches of any grid
        patch_size = as_pair(model.embeds.patch_size)
        rows, columns = model.embeds.pos_embed_grid_size or (16, 16)
        return patch_size, (rows * patch_size[0], columns * patch_size[1]), True
    height, width = as_pair(model.patch_embed.img_size)
    rows, columns = model.patch_embed.grid_size
    # Asked of the embedding: an image that leaves a rest (45 pixels are three patches of 14) does not tell.
    ratio = getattr(model.patch_embed, "feat_ratio", None)
    patch_size = (height // rows, width // columns) if ratio is None else as_pair(ratio(as_scalar=False))
    return patch_size, (height, width), bool(getattr(model, "dynamic_img_size", False))


def _patch_layout(model: Any) -> PatchLayout | None:
    embeds: Any = getattr(model, "embeds", None)
    if not getattr(embeds, "is_linear", False):  # a convolution takes images alone
        return None
    return "height width channels" if embeds.channels_last else "channels height width"


def preprocessing_of(config: Mapping[str, Any], size: tuple[int, int]) -> Preprocessing:
    """Translate the config that ``timm.data.resolve_model_data_config`` gives, for images of a size in pixels."""
    return Preprocessing(
        size=size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=interpolation_name(config["interpolation"]),
        mode=_CROP_MODES.get(config["crop_mode"], "crop"),
        crop_pct=config["crop_pct"],
        geometry="torchvision",
    )
