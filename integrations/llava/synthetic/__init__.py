"""The embedded data set and the tiny pretrained models of the demo, all made from seeds.

`make_dataset` writes images and questions in LLaVA's format; `BACKBONE_FOLDER` and `LLM_FOLDER` are
transformers folders that `make assets` wrote. README.md in `assets/` says how they were made.
"""

from __future__ import annotations

from pathlib import Path

from .dataset import made_from, make_dataset, scene_at
from .questions import KINDS
from .rendering import draw_scene
from .scene import CELL, CHARACTERS, COLORS, GRID, SHAPES, Scene

__all__ = [
    "BACKBONE_FOLDER",
    "CELL",
    "CHARACTERS",
    "COLORS",
    "GRID",
    "KINDS",
    "LLM_FOLDER",
    "SHAPES",
    "Scene",
    "draw_scene",
    "made_from",
    "make_dataset",
    "scene_at",
]

_ASSETS = Path(__file__).parent / "assets"
BACKBONE_FOLDER = _ASSETS / "backbone"
"""Folder of the tiny `CLIPVisionModel` and its image processor."""
LLM_FOLDER = _ASSETS / "llm"
"""Folder of the tiny `LlamaForCausalLM` and its tokenizer."""
