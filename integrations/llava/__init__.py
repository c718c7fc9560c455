"""LLaVA with layerfuse: train, answer, evaluate. Importing it makes transformers' Auto classes know the models.

import integrations.llava
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("runs/demo/mmfuser")
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

# Public name -> module that defines it; imported when first asked for.
_PUBLIC = {
    "Answerer": "generate",
    "Decoding": "decoding",
    "FusedLlavaConfig": "model",
    "FusedLlavaForConditionalGeneration": "model",
    "FusedLlavaModel": "model",
    "Recipe": "config",
    "build_model": "model",
    "load_answerer": "generate",
    "load_model": "checkpoint",
    "load_processor": "checkpoint",
    "load_recipe": "recipe_files",
}

__all__ = list(_PUBLIC)

# Under `python -m integrations.llava`, argv[0] is "-m" while this file runs: the commands import what they need, so
# that `--help` is quick and works without the extras.
if find_spec("transformers") is not None and sys.argv[:1] != ["-m"]:
    importlib.import_module(f"{__name__}.processing")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
