"""Backbone families: Vision Transformers of several libraries behind one interface.

A new family is one file beside this one and one import line below.
"""

from __future__ import annotations

from layerfuse.backbones._any_backbone import AnyBackbone
from layerfuse.backbones._creation import backbone_from_config, create_backbone, list_backbones
from layerfuse.backbones._group import BackboneGroup
from layerfuse.backbones._group_creation import create_backbone_group
from layerfuse.backbones._prismatic import load_prismatic_weights
from layerfuse.backbones.base import BACKBONES, Backbone, BackboneFacts, Stage
from layerfuse.backbones.module import MODULES, ModuleBackbone
from layerfuse.backbones.open_clip import OpenClipBackbone
from layerfuse.backbones.timm import TimmBackbone
from layerfuse.backbones.transformers import TransformersBackbone

__all__ = [
    "BACKBONES",
    "MODULES",
    "AnyBackbone",
    "Backbone",
    "BackboneFacts",
    "BackboneGroup",
    "ModuleBackbone",
    "OpenClipBackbone",
    "Stage",
    "TimmBackbone",
    "TransformersBackbone",
    "backbone_from_config",
    "create_backbone",
    "create_backbone_group",
    "list_backbones",
    "load_prismatic_weights",
]
