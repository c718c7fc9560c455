"""Operators that fusers are made of; they know torch and nothing else of layerfuse."""

from __future__ import annotations

from layerfuse.ops.deformable_attention import IMPLEMENTATIONS, deformable_attention
from layerfuse.ops.deformable_module import MultiScaleDeformableAttention, set_implementation

__all__ = ["IMPLEMENTATIONS", "MultiScaleDeformableAttention", "deformable_attention", "set_implementation"]
