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
    "Answerer": "inference",
    "Decoding": "inference",
    "FusedLlavaConfig": "modeling",
    "FusedLlavaForConditionalGeneration": "modeling",
    "FusedLlavaModel": "modeling",
    "Recipe": "config",
    "build_model": "modeling",
    "load_answerer": "inference",
    "load_model": "checkpoints",
    "load_processor": "checkpoints",
    "load_recipe": "config",
}

__all__ = list(_PUBLIC)


def _is_our_command() -> bool:
    """Tell whether this process is `python -m integrations.llava`, by the command line that the interpreter got.

    Then the commands import what they need, so that `--help` is quick and works without the extras. `sys.argv` does not
    tell: while packages are imported it says "-m" for every module that is run, and programs change it.
    """
    words = sys.orig_argv[1:]
    return f"-m{__name__}" in words or ("-m" in words and words[words.index("-m") + 1 :][:1] == [__name__])


if find_spec("transformers") is not None and not _is_our_command():
    importlib.import_module(f"{__name__}.modeling")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
