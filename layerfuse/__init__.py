"""layerfuse: tap any layers of any Vision Transformer and fuse them into one set of visual tokens."""

from __future__ import annotations

from layerfuse.features import FeatureMaps
from layerfuse.registry import Registry
from layerfuse.taps import resolve_layers, tap

__version__ = "0.1.0"

__all__ = ["FeatureMaps", "Registry", "__version__", "resolve_layers", "tap"]
