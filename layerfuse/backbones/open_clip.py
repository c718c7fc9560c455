"""Backbones from open_clip: its own Vision Transformers (OpenAI's, LAION's CLIP), and the timm models inside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from layerfuse._hub import FETCH_ERRORS, why_not_fetched
from layerfuse.backbones._timm_facts import cut_timm_tail, resize_timm_model, timm_facts
from layerfuse.backbones.base import BACKBONES, Backbone, BackboneFacts, as_pair
from layerfuse.errors import InputError, MissingFileError, MissingPackageError
from layerfuse.layers import LayerChoice
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Mode, Preprocessing, interpolation_name
from layerfuse.registry import unknown_name_message

__all__ = ["OpenClipBackbone", "preprocessing_of"]

_MODES: dict[str, Mode] = {"shortest": "crop", "squash": "squash", "longest": "border"}
_CONFIG_FILE = "open_clip_config.json"
_SCHEMES = ("hf-hub:", "local-dir:")
# Of the CLIP model rather than of its vision tower.
_OUTER_OPTIONS = ("quick_gelu", "embed_dim", "cache_dir")


@BACKBONES.register("open_clip")
class OpenClipBackbone(Backbone):
    """The vision tower of an open_clip model. Other arguments and errors are `Backbone`'s.

    Args:
        model: ``open_clip.create_model(...).visual``: a VisionTransformer, or a TimmModel that holds one.
        image_size: as in `Backbone.from_name`; only for timm models inside open_clip.
        preprocessing: the model's ``preprocess_cfg`` if None, or else OpenAI's statistics.

    Raises:
        ValueError: if the tower is no Vision Transformer, or the size is not possible.
    """

    family = "open_clip"
    library = "open_clip"

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerChoice,
        image_size: int | tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
        _recipe: Mapping[str, Any] | None = None,
    ) -> None:
        facts = _facts(model)
        size = facts.image_size if image_size is None else as_pair(image_size)
        if size != facts.image_size:
            trunk = getattr(model, "trunk", None)
            if not isinstance(trunk, nn.Module):
                raise InputError(
                    f"this open_clip VisionTransformer takes only {facts.image_size[0]}x{facts.image_size[1]} pixels "
                    f"and cannot be resized to {size[0]}x{size[1]} once it is built; use "
                    f"OpenClipBackbone.from_name(..., image_size={size})."
                )
            facts = resize_timm_model(trunk, facts, size)
        if preprocessing is None:
            preprocessing = preprocessing_of(getattr(model, "preprocess_cfg", {}), size)
        facts = replace(facts, preprocessing=replace(preprocessing, size=size))
        recipe = None if _recipe is None else {**_recipe, "image_size": list(size)}
        super().__init__(model, layers=layers, facts=facts, recipe=recipe)

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        layers: LayerChoice,
        pretrained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> OpenClipBackbone:
        """Build the vision tower of an open_clip model as `Backbone.from_name` says.

        ``name`` is ``"model/tag"``, such as ``"ViT-L-14-336-quickgelu/openai"`` (``"model:tag"`` does, too), with a
        file of weights instead of the tag if wanted; or ``"hf-hub:owner/name"``, or ``"local-dir:path"``. Without
        weights the tag may be left out. For another ``image_size`` position embeddings are resampled. ``options`` are
        fields of ``open_clip.CLIPVisionCfg``, and ``quick_gelu``, ``embed_dim`` (of the projection), ``cache_dir``.
        """
        open_clip = _import_open_clip()
        given = dict(options or {})
        known = (*open_clip.CLIPVisionCfg.__dataclass_fields__, *_OUTER_OPTIONS)
        for key in given:
            if key not in known:
                raise InputError(unknown_name_message("open_clip option", key, known))
        size = None if image_size is None else as_pair(image_size)
        if name.startswith(_SCHEMES):
            base, tag = name, None
            config, described = _read_scheme(name)
            preprocessing = preprocessing_of(described, (1, 1))
        else:
            base, tag = (*re.split("[/:]", name, maxsplit=1), "")[:2]
            config = _model_config(open_clip, base, tag, pretrained=pretrained)
            preprocessing = _of_tag(open_clip, base, tag)
        recipe = _recipe(config, given, size)
        if pretrained:
            _check_resampled(recipe["vision_cfg"], config["vision_cfg"])
            model = _load(open_clip, base, tag, recipe, size=size, cache_dir=given.get("cache_dir"))
        else:
            model = _build(open_clip, recipe)
        return cls(model, layers=layers, image_size=size, preprocessing=preprocessing, _recipe=recipe)

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any], *, layers: Sequence[int]) -> OpenClipBackbone:
        """Build a recipe as `Backbone.rebuild` says."""
        model = _build(_import_open_clip(), recipe)
        return cls(model, layers=layers, image_size=recipe["image_size"], _recipe=recipe)

    @classmethod
    def find_model(cls, held: object) -> nn.Module:
        """Find the vision tower, also of a whole CLIP."""
        return super().find_model(getattr(held, "visual", held))

    @classmethod
    def list_names(cls) -> list[str]:
        """Return Vision Transformers with the tags of their weights, such as ``"ViT-L-14/openai"``."""
        open_clip = _import_open_clip()
        pairs = sorted(open_clip.list_pretrained())
        return [f"{base}/{tag}" for base, tag in pairs if _is_vit(open_clip.get_model_config(base)["vision_cfg"])]

    def cut_tail(self, model: nn.Module) -> None:
        """Remove final norm, pooling and head from the model."""
        trunk = getattr(model, "trunk", None)
        if isinstance(trunk, nn.Module):
            cut_timm_tail(trunk)
            model.head = nn.Identity()
            return
        model.ln_post = nn.Identity()
        for name in ("attn_pool", "attn_pool_contrastive", "proj"):
            setattr(model, name, None)


def _import_open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise MissingPackageError(
            "the backbone family 'open_clip' needs the package open_clip_torch; install it with "
            "`pip install layerfuse[open-clip]`."
        ) from error
    module: ModuleType = open_clip
    return module


def _facts(model: Any) -> BackboneFacts:
    trunk = getattr(model, "trunk", None)
    if isinstance(trunk, nn.Module):
        return timm_facts(trunk, path="trunk.")
    transformer = getattr(model, "transformer", None)
    if transformer is None or not hasattr(transformer, "resblocks") or not hasattr(model, "class_embedding"):
        raise InputError(
            f"{type(model).__name__} is no Vision Transformer of open_clip; hand over "
            "open_clip.create_model(...).visual of a ViT, or of a model with a timm ViT inside (EVA02, SigLIP, PE)."
        )
    size = as_pair(model.image_size)
    return BackboneFacts(
        blocks="transformer.resblocks",
        embed_dim=transformer.width,
        num_prefix_tokens=1,
        patch_size=as_pair(model.patch_size),
        image_size=size,
        any_size=False,
        preprocessing=Preprocessing(size=size, mean=CLIP_MEAN, std=CLIP_STD, geometry="torchvision"),
    )


def preprocessing_of(config: Mapping[str, Any], size: tuple[int, int]) -> Preprocessing:
    """Translate open_clip's ``preprocess_cfg``, for (height, width) in pixels; OpenAI's values fill the gaps."""
    return Preprocessing(
        size=size,
        mean=tuple(config.get("mean", CLIP_MEAN)),
        std=tuple(config.get("std", CLIP_STD)),
        interpolation=interpolation_name(config.get("interpolation", "bicubic")),
        mode=_MODES[config.get("resize_mode", "shortest")],
        geometry="torchvision",
        fill=(config.get("fill_color", 0),) * 3,
    )


def _of_tag(open_clip: ModuleType, base: str, tag: str) -> Preprocessing:
    # A built model without weights reports OpenAI's statistics for SigLIP too; only the tag's config knows better.
    tags = open_clip.list_pretrained_tags_by_model(base)
    chosen = tag if tag in tags else (tags[0] if tags else "")
    return preprocessing_of(open_clip.get_pretrained_cfg(base, chosen) if chosen else {}, (1, 1))


def _model_config(open_clip: ModuleType, base: str, tag: str, *, pretrained: bool) -> dict[str, Any]:
    config: dict[str, Any] | None = open_clip.get_model_config(base)
    if config is None:
        raise InputError(unknown_name_message("open_clip model", base, open_clip.list_models()))
    if pretrained and not tag:
        tags = open_clip.list_pretrained_tags_by_model(base)
        raise InputError(
            f"open_clip model {base!r} needs a tag that says which weights, as in '{base}/{(tags or ['file'])[0]}'; "
            f"known tags: {', '.join(tags) or 'none'}; or pass pretrained=False."
        )
    return config


def _is_vit(vision: Mapping[str, Any]) -> bool:
    timm_name = vision.get("timm_model_name")
    # A ResNet has four numbers of layers.
    return timm_name.startswith(("vit", "eva")) if timm_name else isinstance(vision["layers"], int)


def _read_scheme(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    scheme, _, place = name.partition(":")
    if scheme == "hf-hub":
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(place, _CONFIG_FILE))
        except FETCH_ERRORS as error:
            raise InputError(
                f"open_clip cannot get {_CONFIG_FILE} of {place!r}: {why_not_fetched(error)}. Check the name, fill the "
                "cache where there is a network, or give a folder (open_clip:local-dir:FOLDER)."
            ) from error
    else:
        file = Path(place) / _CONFIG_FILE
    if not file.is_file():
        raise MissingFileError(
            f"{place} holds no {_CONFIG_FILE}, so it is no open_clip model folder; give a folder that open_clip saved."
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    return config["model_cfg"], config.get("preprocess_cfg", {})


def _recipe(config: Mapping[str, Any], given: Mapping[str, Any], size: tuple[int, int] | None) -> dict[str, Any]:
    tower = {key: value for key, value in given.items() if key not in _OUTER_OPTIONS}
    vision = {**config["vision_cfg"], **tower, "timm_model_pretrained": False}
    if size is not None:
        vision["image_size"] = list(size)
    return {
        "vision_cfg": vision,
        "embed_dim": given.get("embed_dim", config["embed_dim"]),
        "quick_gelu": given.get("quick_gelu", config.get("quick_gelu", False)),
    }


def _check_resampled(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a size whose weights open_clip would take as they are, since there are as many patches as it looks for."""
    if "timm_model_name" in wanted or not {"patch_size", "image_size"} <= set(given):
        return
    patch = as_pair(wanted["patch_size"])
    sizes = (as_pair(vision["image_size"]) for vision in (given, wanted))
    own, other = ((height // patch[0], width // patch[1]) for height, width in sizes)
    if own != other and own[0] * own[1] == other[0] * other[1]:
        raise InputError(
            f"open_clip resamples no position embeddings from a grid of {own[0]}x{own[1]} patches to "
            f"{other[0]}x{other[1]}, which has as many; take another image_size, or pretrained=False."
        )


def _build(open_clip: ModuleType, recipe: Mapping[str, Any]) -> nn.Module:
    # The public way to a vision tower without weights is a whole CLIP; its text tower is made as small as it can be.
    text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(
        embed_dim=recipe["embed_dim"],
        vision_cfg=dict(recipe["vision_cfg"]),
        text_cfg=text,
        quick_gelu=recipe["quick_gelu"],
    )
    tower: nn.Module = clip.visual
    return tower


def _load(
    open_clip: ModuleType,
    base: str,
    tag: str | None,
    recipe: Mapping[str, Any],
    *,
    size: tuple[int, int] | None,
    cache_dir: str | None,
) -> nn.Module:
    try:
        clip = open_clip.create_model(
            base,
            pretrained=tag,
            cache_dir=cache_dir,
            force_image_size=size,
            vision_cfg=dict(recipe["vision_cfg"]),
            embed_dim=recipe["embed_dim"],
            quick_gelu=recipe["quick_gelu"],
        )
    except (*FETCH_ERRORS, RuntimeError) as error:
        tags = open_clip.list_pretrained_tags_by_model(base)
        raise InputError(
            f"open_clip cannot load {tag or base!r} into {base!r}: {why_not_fetched(error)}. Known tags: "
            f"{', '.join(tags) or 'none'}; a file of weights is given by its path; or pass pretrained=False "
            "(--pretrained false)."
        ) from error
    tower: nn.Module = clip.visual
    return tower
