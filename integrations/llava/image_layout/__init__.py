"""How many tokens an image takes in the text, and where they stand: one object that data, model and inference ask.

Another arrangement of tokens is one file with a subclass of `ImageLayout`, plus its import line here.
"""

from __future__ import annotations

from .anyres import AnyResLayout, default_pinpoints
from .fixed import FixedLayout
from .layout import LAYOUTS, ImageLayout, ImageSize, layout_from_config

__all__ = [
    "LAYOUTS",
    "AnyResLayout",
    "FixedLayout",
    "ImageLayout",
    "ImageSize",
    "default_pinpoints",
    "layout_from_config",
]
