"""Tasks of the demo's embedded data set."""

from __future__ import annotations

from .box import BoxTask
from .color import ColorTask
from .counting import CountingTask
from .ocr import OcrTask
from .shape import ShapeTask

__all__ = ["BoxTask", "ColorTask", "CountingTask", "OcrTask", "ShapeTask"]
