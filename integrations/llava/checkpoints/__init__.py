"""Checkpoints: written whole or not at all, loaded completely or not at all, converted between layouts."""

from __future__ import annotations

import warnings
from typing import Any

from .connector import load_connector, save_connector
from .content import Options
from .convert import convert, convert_connector
from .lora import save_lora
from .model_io import load_config, load_model, load_processor, save_model
from .reading import LAYOUTS, layout_of
from .source import Checkpoint, model_source

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "Options",
    "convert",
    "convert_connector",
    "layout_of",
    "load_config",
    "load_connector",
    "load_model",
    "load_processor",
    "model_source",
    "save_connector",
    "save_lora",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name == "convert_adapter":
        warnings.warn("convert_adapter is now called convert_connector", DeprecationWarning, stacklevel=2)
        return convert_connector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
