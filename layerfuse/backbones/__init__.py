"""Backbone families: Vision Transformers of several libraries behind one interface.

A new family is one file beside this one and one import line below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerfuse.backbones.base import BACKBONES, Backbone, BackboneFacts
from layerfuse.backbones.module import MODULES, ModuleBackbone
from layerfuse.backbones.open_clip import OpenClipBackbone
from layerfuse.backbones.timm import TimmBackbone
from layerfuse.backbones.transformers import TransformersBackbone
from layerfuse.errors import InputError

__all__ = [
    "BACKBONES",
    "MODULES",
    "Backbone",
    "BackboneFacts",
    "ModuleBackbone",
    "OpenClipBackbone",
    "TimmBackbone",
    "TransformersBackbone",
    "backbone_from_config",
    "create_backbone",
]


def create_backbone(
    family: str,
    name: str,
    *,
    layers: int | Sequence[int],
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build a backbone by family and name.

    Args:
        family: ``"timm"``, ``"open_clip"``, ``"transformers"``, ``"module"``, or one of another package.
        name: of the model, as the library writes it; the families' ``from_name`` say how, with tags and local folders.
        layers: layer numbers in the order wanted: 0 = embeddings, k = output of block k, negatives from the end.
        pretrained: load the library's weights; else random ones.
        image_size: edge or (height, width) in pixels, if not the model's own.
        options: for the library's own constructor.

    Returns:
        The backbone, cut after the deepest tapped layer.

    Raises:
        ValueError: if the family, the name, a layer, the image size or an option is not possible.
        ImportError: if the family's library is not installed; the message says what to install.
    """
    return BACKBONES.get(family).from_name(
        name, layers=layers, pretrained=pretrained, image_size=image_size, options=options
    )


def backbone_from_config(config: Mapping[str, Any]) -> Backbone:
    """Build the architecture that a backbone's ``config`` describes, with random weights; nothing is downloaded.

    Args:
        config: ``backbone.config``.

    Returns:
        A backbone with the same state dict keys and shapes.

    Raises:
        ValueError: if the config names no family or an unknown one, or lacks keys.
    """
    if "family" not in config:
        raise InputError(
            f"a backbone config needs the key 'family' (one of {', '.join(BACKBONES.names())}); this one has "
            f"{', '.join(config) or 'no keys'}."
        )
    return BACKBONES.get(config["family"]).from_config(config)
