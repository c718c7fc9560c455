"""Backbones built from a name, a config or a model, on a device and in a dtype that are named; the list of names."""

from __future__ import annotations

import copy as copying
import inspect
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from layerfuse.backbones._any_backbone import AnyBackbone
from layerfuse.backbones._group import BackboneGroup
from layerfuse.backbones.base import BACKBONES, Backbone
from layerfuse.errors import InputError, InvalidTypeError, MissingPackageError
from layerfuse.layers import LayerChoice
from layerfuse.registry import unknown_name_message

__all__ = ["as_device", "as_dtype", "backbone_from_config", "create_backbone", "list_backbones", "named_once"]


def create_backbone(
    model: object,
    held: object = None,
    *,
    layers: LayerChoice,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
    copy: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Backbone:
    """Build a backbone from a name, a config of transformers, or a model that you hold, in evaluation mode.

    A model that is handed over is cut after the deepest tapped layer, and used from then on by the backbone; with
    ``copy=True`` its vision model is copied first and it stays as it is.

    Args:
        model: ``"family:name"``, such as ``"timm:vit_large_patch14_clip_quickgelu_336.openai"``,
            ``"open_clip:ViT-L-14/openai"``, ``"transformers:openai/clip-vit-large-patch14"``, ``"transformers:" +
            folder`` or ``"module:my-vit"``; the families' ``from_name`` say which names they take. Or a config of
            transformers, which gives random weights. Or a model of timm, open_clip or transformers (of a larger one the
            vision model inside is taken), or any module with the ``options`` of `ModuleBackbone`. Or a family, with the
            model second.
        held: a model or config where ``model`` names the family that it is to be taken for.
        layers: layer numbers (0 = embeddings, k = output of block k, negatives from the end), shares of the depth
            (floats in (0, 1]), or `layerfuse.spread`, in the order wanted.
        pretrained: of a name, load the library's weights; else random ones.
        image_size: edge or (height, width) in pixels, if not the model's own.
        options: of a name, for the library's own constructor; of a model, for the backbone's.
        copy: copy a model that is handed over rather than cut it.
        device: where the backbone goes, if not where it is built.
        dtype: of all weights, such as torch.bfloat16 or its name, if not the library's.

    Raises:
        ValueError: if the family, the name, a layer, the image size or an option is not possible.
        TypeError: if this is neither a name nor a model nor a config.
        ImportError: if the family's library is not installed; the message says what to install.
    """
    model, held = named_once("create_backbone", model, held)
    place, precision = as_device(device), as_dtype(dtype)
    if isinstance(model, str) and held is None:
        family, name = _split(model)
        backbone = family.from_name(name, layers=layers, pretrained=pretrained, image_size=image_size, options=options)
    else:
        family = BACKBONES.get(model) if isinstance(model, str) else _family_of(model)
        found = family.find_model(held if isinstance(model, str) else model)
        given = dict(options or {}) | ({} if image_size is None else {"image_size": image_size})
        _check_arguments(family, found, given)
        build: Any = family
        backbone = build(copying.deepcopy(found) if copy else found, layers=layers, **given)
    return backbone.to(device=place, dtype=precision).eval()


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the floating dtype that a user means; None for None and "auto", which leave weights as they are."""
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found is None or found == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {dtype!r} is no floating dtype of torch; give torch.bfloat16, 'float16', … or None.")
    return found


def as_device(
    device: torch.device | str | None, device_map: Mapping[str, Any] | torch.device | str | None = None
) -> torch.device | None:
    """Return the one device that all weights go to; None leaves them where they are.

    ``device_map`` says the same in transformers' words, also as ``{"": device}``.
    """
    if device is not None and device_map is not None:
        raise InputError("device and device_map say the same; give one of them.")
    place = device if device is not None else device_map
    if isinstance(place, Mapping):
        if set(place) != {""}:
            raise InputError(f"device_map {dict(place)} splits the encoder, which lies on one device; give device=….")
        place = place[""]
    if place is None:
        return None
    try:
        return torch.device(place)
    except RuntimeError as error:
        raise InputError(
            f"{place!r} is no device of torch; an encoder lies on one: give 'cpu', 'cuda', 'cuda:1', 'mps', …"
        ) from error


def named_once(function: str, model: object, held: object) -> tuple[object, object]:
    """Return model and held with a name as one text, ``family:name``; version 0.1 took it as two arguments."""
    if held is not None and not isinstance(model, str):
        raise InvalidTypeError(
            f"{function} takes one model; the first of two arguments names its family, got a {type(model).__name__}."
        )
    if not isinstance(held, str):
        return model, held
    warnings.warn(
        f'{function}("{model}", "{held}", …) is deprecated; write {function}("{model}:{held}", …).',
        DeprecationWarning,
        stacklevel=3,
    )
    return f"{model}:{held}", None


def backbone_from_config(config: Mapping[str, Any]) -> AnyBackbone:
    """Build the architecture that a backbone's ``config`` describes, with random weights; nothing is downloaded.

    The config may be that of a `BackboneGroup`.

    Raises:
        ValueError: if the config names no family or an unknown one, or lacks keys.
    """
    if "backbones" in config:
        return BackboneGroup.from_config(config)
    if "family" not in config:
        raise InputError(
            f"a backbone config needs the key 'family' (one of {', '.join(BACKBONES.names())}); this one has "
            f"{', '.join(config) or 'no keys'}."
        )
    return BACKBONES.get(config["family"]).from_config(config)


def list_backbones(family: str | None = None, pattern: str = "*") -> list[str]:
    """List names that `create_backbone` and `layerfuse.create_encoder` take, as far as they can be told offline.

    These are names with their family, such as ``"timm:vit_base_patch16_clip_224.openai"``: with weights for timm and
    open_clip, known model types for transformers, registered classes for module.

    Args:
        family: a name in `BACKBONES`; all families whose libraries are installed if None.
        pattern: of the name behind the family, with ``*`` and ``?``, such as ``"*clip*"``.

    Raises:
        ValueError: if the family is unknown.
        ImportError: if its library is not installed.
    """
    found = []
    for each in BACKBONES if family is None else (family,):
        try:
            names = BACKBONES.get(each).list_names()
        except MissingPackageError:
            if family is not None:
                raise
            continue
        found += [f"{each}:{name}" for name in names if fnmatchcase(name, pattern)]
    return found


def _split(model: str) -> tuple[type[Backbone], str]:
    family, _, name = model.partition(":")
    if not name:
        example = "timm:vit_large_patch14_clip_quickgelu_336.openai"
        raise InputError(
            f"{model!r} says no family; write 'family:name', for example {example!r} or 'transformers:{model}'. "
            f"Families: {', '.join(BACKBONES)}."
        )
    return BACKBONES.get(family), name


def _family_of(held: object) -> type[Backbone]:
    families = {BACKBONES.get(name).library: BACKBONES.get(name) for name in BACKBONES}
    for ancestor in type(held).__mro__:
        package = ancestor.__module__.partition(".")[0]
        if package in families:
            return families[package]
    if not isinstance(held, nn.Module):
        raise InvalidTypeError(
            f"a backbone is made from a name such as 'timm:vit_base_patch16_clip_224.openai', a model or a config of "
            f"transformers; got a {type(held).__name__}. Several backbones are made by create_backbone_group."
        )
    return BACKBONES.get("module")


def _check_arguments(family: type[Backbone], model: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse options that the constructor of a family does not take, or their absence where it needs them."""
    parameters = [
        parameter
        for name, parameter in inspect.signature(family).parameters.items()
        if name not in ("model", "layers", "recipe") and not name.startswith("_")
    ]
    known = [parameter.name for parameter in parameters]
    for name in given:
        if name not in known:
            raise InputError(unknown_name_message(f"option of {family.__name__}", name, known))
    missing = [each.name for each in parameters if each.default is each.empty and each.name not in given]
    if missing:
        raise InputError(
            f"a {type(model).__name__} is tapped by the backbone family {family.family!r}, which must be told its "
            f"{', '.join(missing)}; give them as options of the backbone. Models of timm, open_clip and transformers "
            "are known by their class."
        )
