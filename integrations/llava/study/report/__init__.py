"""The report: one HTML file that needs nothing beside it, its charts and its pictures."""

from __future__ import annotations

from .document import render_report
from .pictures import draw_examples, draw_feature_maps, thumbnail

__all__ = ["draw_examples", "draw_feature_maps", "render_report", "thumbnail"]
