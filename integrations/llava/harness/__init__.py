"""Checkpoints asked by other projects' evaluation harnesses: lmms-eval finds `layerfuse_llava` by itself.

An entry point leads lmms-eval here, whatever model it is about to run, so importing this loads nothing else.
"""

from __future__ import annotations

from typing import Any

__all__ = ["lmms_eval_manifest"]


def lmms_eval_manifest() -> Any:
    """Describe `layerfuse_llava` to lmms-eval: its class for tasks of messages, and that for all others."""
    from lmms_eval.models.registry_v2 import ModelManifest

    classes = f"{__name__}.lmms_eval_models"
    return ModelManifest(
        "layerfuse_llava",
        simple_class_path=f"{classes}.LmmsEvalSimple",
        chat_class_path=f"{classes}.LmmsEvalChat",
    )
