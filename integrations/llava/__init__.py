"""LLaVA with layerfuse: train, answer, evaluate. Importing it makes transformers' Auto classes know the models.

import integrations.llava
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("runs/demo/mmfuser")
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import PurePath
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


class _Thread(threading.local):
    importing = False


class _ModelsBehindTransformers(MetaPathFinder):
    """Imports the models, which registers them, as soon as the import that brought transformers along is over.

    Nobody can ask its Auto classes before; and this package, and the commands' `--help`, take no seconds to import.
    Installed libraries that import transformers themselves (peft, open_clip) are whole by then, since what the models
    import may import them. A module of the user's own is not waited for: it may load a model while it is imported.
    """

    def __init__(self) -> None:
        self.thread = _Thread()
        self.whole = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.thread.importing and fullname != "transformers":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            installed = {"site-packages", "dist-packages"}.intersection(PurePath(spec.origin or "").parts)
            if installed or fullname == "transformers":
                spec.loader = _Followed(spec.loader, self)  # type: ignore[assignment]
        return spec

    def follow(self, load: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Load a module, and the models behind the outermost one if transformers has come with it."""
        outer, self.thread.importing = self.thread.importing, True
        try:
            load(module)
            self.whole |= module.__name__ == "transformers"
        finally:
            self.thread.importing = outer
            # Also behind a library that failed: transformers, imported again, comes past no finder.
            if self.whole and not outer and self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(f"{__name__}.modeling")


class _Followed:
    """The loader of a module, until the module is loaded; finders may give one loader to many modules."""

    def __init__(self, loader: Any, finder: _ModelsBehindTransformers) -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own loader back, and load it."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.finder.follow(self.loader.exec_module, module)


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
