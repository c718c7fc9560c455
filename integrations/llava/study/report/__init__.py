"""The report: one HTML file that needs nothing beside it, its charts and its pictures; and that of losses."""

from __future__ import annotations

from .document import render_maps, render_report
from .losses import RunLosses, draw_losses, read_losses, render_losses
from .maps import draw_layers, draw_points, draw_readings, draw_shares
from .pictures import draw_examples, thumbnail

__all__ = [
    "RunLosses",
    "draw_examples",
    "draw_layers",
    "draw_losses",
    "draw_points",
    "draw_readings",
    "draw_shares",
    "read_losses",
    "render_losses",
    "render_maps",
    "render_report",
    "thumbnail",
]
