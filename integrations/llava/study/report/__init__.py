"""The report: one HTML file that needs nothing beside it, its charts and its pictures; and that of losses."""

from __future__ import annotations

from .document import render_report
from .losses import RunLosses, draw_losses, read_losses, render_losses
from .pictures import draw_examples, draw_feature_maps, thumbnail

__all__ = [
    "RunLosses",
    "draw_examples",
    "draw_feature_maps",
    "draw_losses",
    "read_losses",
    "render_losses",
    "render_report",
    "thumbnail",
]
