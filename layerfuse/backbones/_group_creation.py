"""A group of backbones built from names, configs or models, each with its own layers, size and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerfuse.backbones._creation import as_device, as_dtype, create_backbone
from layerfuse.backbones._group import BackboneGroup
from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.layers import LayerChoice

__all__ = ["create_backbone_group"]

ImageSize = int | tuple[int, int] | None


def create_backbone_group(
    models: Sequence[object],
    *,
    layers: LayerChoice | Sequence[LayerChoice],
    resample: str | None = "bilinear",
    grid: Sequence[int] | None = None,
    pretrained: bool | Sequence[bool] = True,
    image_size: ImageSize | list[ImageSize] = None,
    options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    copy: bool | Sequence[bool] = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> BackboneGroup:
    """Build several backbones side by side, in evaluation mode.

    Arguments without another word are `create_backbone`'s: one value for all backbones, or a list of one for each.

    Args:
        models: one for each backbone, as in `create_backbone`.
        layers: a choice of layers for each backbone, ``[(3, 8, -2), (-2,)]``; a single number, or a function such as
            `layerfuse.spread` makes, is for all of them.
        resample: ``"bilinear"``, ``"bicubic"`` or ``"nearest"`` brings all maps to one grid; with None each backbone
            keeps its own.
        grid: (H, W) of that grid, in patches; if None, that of the first backbone.
        pretrained: one value, or a list.
        image_size: one value, an edge or a tuple (height, width), or a list.
        options: one value, or a list.
        copy: one value, or a list.
        device: where all backbones go.
        dtype: of all weights.

    Raises:
        ValueError: if a list has not one entry for each backbone, or an entry is not possible.
        TypeError: if a model is neither a name nor a model nor a config.
        ImportError: if a library is not installed.
    """
    place, precision = as_device(device), as_dtype(dtype)
    if not isinstance(models, (list, tuple)):
        raise InvalidTypeError(f"models is a {type(models).__name__}; give a list with one model for each backbone.")
    count = len(models)
    chosen = _one_each("layers", layers, count, list, tuple)
    weights = _one_each("pretrained", pretrained, count, list, tuple)
    sizes = _one_each("image_size", image_size, count, list)
    given = _one_each("options", options, count, list, tuple)
    copies = _one_each("copy", copy, count, list, tuple)
    _check_once(models, copies)
    backbones = [
        create_backbone(model, layers=own, pretrained=load, image_size=size, options=arguments, copy=copied)
        for model, own, load, size, arguments, copied in zip(models, chosen, weights, sizes, given, copies, strict=True)
    ]
    return BackboneGroup(backbones, resample=resample, grid=grid).to(device=place, dtype=precision).eval()


def _check_once(models: Sequence[object], copies: Sequence[bool]) -> None:
    """Refuse one model for several backbones before the first of them cuts it; copies that are made first may be."""
    for place, (model, copied) in enumerate(zip(models, copies, strict=True)):
        if isinstance(model, nn.Module) and not copied and any(model is later for later in models[place + 1 :]):
            raise InputError(
                f"models has one model, a {type(model).__name__}, for several backbones, and each cuts its own; set "
                "copy=True, or tap more layers of one backbone."
            )


def _one_each(name: str, given: Any, count: int, *lists: type) -> list[Any]:
    """Return one value for each backbone, of one of the kinds of lists of them, or one for all."""
    entries: Any = given
    if not isinstance(given, lists):
        if name == "layers" and not (callable(given) or isinstance(given, (int, float))):
            raise InvalidTypeError(
                f"layers of several backbones are a {type(given).__name__}; give a list with a choice for each, such "
                "as [(3, 8, -2), (-2,)], or one number for all."
            )
        return [given] * count
    if len(entries) != count:
        example = " (an edge for all, or a tuple (height, width), is no list)" if name == "image_size" else ""
        raise InputError(
            f"{name} has {len(entries)} entries for {count} backbones: {given!r}; give one for each{example}."
        )
    return list(entries)
