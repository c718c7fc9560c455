"""Multi-scale deformable attention (arXiv:2010.04159): its paths, and the layer around them."""

from __future__ import annotations

from layerfuse.ops.deformable.attention import IMPLEMENTATIONS, deformable_attention
from layerfuse.ops.deformable.module import MultiScaleDeformableAttention, set_implementation
from layerfuse.ops.deformable.traffic import least_traffic

__all__ = [
    "IMPLEMENTATIONS",
    "MultiScaleDeformableAttention",
    "deformable_attention",
    "least_traffic",
    "set_implementation",
]
