"""layerfuse: tap any layers of any Vision Transformer and fuse them into one set of visual tokens.

    encoder = layerfuse.create_encoder("timm:vit_large_patch14_clip_quickgelu_336.openai",
                                       layers=(3, 8, 13, 18, -2), fuser="mmfuser")
    tokens = encoder(encoder.prepare(pictures))  # (B, N, C)

Shapes are written in the letters of `layerfuse.features`.
"""

from __future__ import annotations

from layerfuse.backbones import (
    BACKBONES,
    Backbone,
    BackboneFacts,
    BackboneGroup,
    create_backbone,
    create_backbone_group,
    list_backbones,
)
from layerfuse.encoder import FusedEncoder, check_fuser_fits, create_encoder
from layerfuse.extraction import extract_features
from layerfuse.features import FeatureMaps
from layerfuse.fusers import FUSERS, Fuser, FuserCost, create_fuser, list_fusers
from layerfuse.layers import resolve_layers, spread
from layerfuse.ops import deformable_attention
from layerfuse.preprocessing import Preprocessing
from layerfuse.registry import Registry
from layerfuse.taps import tap

__version__ = "0.1.0"

__all__ = [
    "BACKBONES",
    "FUSERS",
    "Backbone",
    "BackboneFacts",
    "BackboneGroup",
    "FeatureMaps",
    "FusedEncoder",
    "Fuser",
    "FuserCost",
    "Preprocessing",
    "Registry",
    "__version__",
    "check_fuser_fits",
    "create_backbone",
    "create_backbone_group",
    "create_encoder",
    "create_fuser",
    "deformable_attention",
    "extract_features",
    "list_backbones",
    "list_fusers",
    "resolve_layers",
    "spread",
    "tap",
]
