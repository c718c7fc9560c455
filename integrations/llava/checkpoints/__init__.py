"""Checkpoints: written whole or not at all, loaded completely or not at all, converted between layouts."""

from __future__ import annotations

from .connector import load_adapter, save_adapter
from .convert import LAYOUTS, convert, convert_adapter, layout_of
from .lora import save_lora
from .model_io import load_config, load_model, load_processor, save_model
from .options import Options

__all__ = [
    "LAYOUTS",
    "Options",
    "convert",
    "convert_adapter",
    "layout_of",
    "load_adapter",
    "load_config",
    "load_model",
    "load_processor",
    "save_adapter",
    "save_lora",
    "save_model",
]
