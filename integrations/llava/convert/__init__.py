"""Conversion between our layout and those of MMFuser, LLaVA-1.5 and transformers' LLaVA.

Every layout is read into our terms (`content`) and written from there, one tensor at a time.
"""

from __future__ import annotations

from .conversion import LAYOUTS, convert, convert_adapter, layout_of
from .options import Options

__all__ = ["LAYOUTS", "Options", "convert", "convert_adapter", "layout_of"]
