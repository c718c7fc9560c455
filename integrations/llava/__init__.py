"""LLaVA with layerfuse: train, answer, evaluate. Importing it makes transformers' Auto classes know the models.

import integrations.llava
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("runs/demo/mmfuser")
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Public name -> package that defines it; imported when first asked for.
_PUBLIC = {
    "FusedLlavaConfig": "modeling",
    "FusedLlavaForConditionalGeneration": "modeling",
    "FusedLlavaModel": "modeling",
    "Predictor": "inference",
    "Recipe": "config",
    "SamplingParams": "inference",
    "build_model": "modeling",
    "evaluate": "evaluation",
    "load_model": "checkpoints",
    "load_predictor": "inference",
    "load_processor": "checkpoints",
    "load_recipe": "config",
    "train": "training",
}
# Names of 0.1.
_RENAMED = {"Answerer": "Predictor", "Decoding": "SamplingParams", "load_answerer": "load_predictor"}

__all__ = list(_PUBLIC)


class _ModelsBehindTransformers(MetaPathFinder):
    """Imports the models, which registers them, as soon as transformers has been imported.

    Nobody can ask its Auto classes before; and this package, and the commands' `--help`, take no seconds to import.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                run(module)
                importlib.import_module(f"{__name__}.modeling")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    importlib.import_module(f"{__name__}.modeling")
else:
    sys.meta_path.insert(0, _ModelsBehindTransformers())


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"{name} is now called {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
