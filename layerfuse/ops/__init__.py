"""Operators that fusers are made of; they know torch and nothing else of layerfuse."""

from __future__ import annotations

from layerfuse.ops.deformable import (
    IMPLEMENTATIONS,
    MultiScaleDeformableAttention,
    deformable_attention,
    set_implementation,
)

__all__ = ["IMPLEMENTATIONS", "MultiScaleDeformableAttention", "deformable_attention", "set_implementation"]
