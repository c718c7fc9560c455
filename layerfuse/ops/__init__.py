"""Operators that fusers are made of; they know torch and nothing else of layerfuse."""

from __future__ import annotations

from layerfuse.ops.channel_scale import ChannelScale
from layerfuse.ops.deformable import (
    IMPLEMENTATIONS,
    MultiScaleDeformableAttention,
    deformable_attention,
    least_traffic,
    set_implementation,
)
from layerfuse.ops.heads import check_heads

__all__ = [
    "IMPLEMENTATIONS",
    "ChannelScale",
    "MultiScaleDeformableAttention",
    "check_heads",
    "deformable_attention",
    "least_traffic",
    "set_implementation",
]
