"""How many tokens an image takes in the text, and where they stand: one object that data, model and inference ask.

Another arrangement (tiles, tokens that are merged, two backbones) is one file with a subclass of `ImageLayout`, plus
its import line here.
"""

from __future__ import annotations

from .fixed import FixedLayout
from .layout import LAYOUTS, ImageLayout, ImageSize, layout_from_config

__all__ = ["LAYOUTS", "FixedLayout", "ImageLayout", "ImageSize", "layout_from_config"]
