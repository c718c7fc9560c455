"""How several processes share a run: what each engine tells transformers' TrainingArguments.

The engines are torch's DDP and FSDP2 and DeepSpeed's ZeRO-2 and ZeRO-3; their settings are the JSON files beside this
one, in the form transformers documents. One process needs no engine.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from integrations.llava.model import FusedLlavaForConditionalGeneration

__all__ = ["check_engine", "engine_arguments", "release_engine", "shards"]

_FOLDER = Path(__file__).parent


def check_engine(engine: str, *, num_processes: int, cpu: bool) -> None:
    """Refuse an engine that would not do what it is asked to, before anything is loaded.

    Args:
        engine: a name from `ENGINES`.
        num_processes: how many share the run.
        cpu: whether they compute on the CPU.

    Raises:
        ValueError: if it cannot run here; another is named.
    """
    if num_processes == 1 or engine == "ddp":
        return
    if engine == "fsdp2" and cpu:
        # accelerate would use DDP without a word.
        raise ValueError("engine 'fsdp2' needs GPUs; on CPUs use 'ddp' (--finetune.engine ddp).")
    if engine in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise ValueError(f"engine {engine!r} needs DeepSpeed (pip install 'layerfuse[deepspeed]'), or use 'fsdp2'.")


def engine_arguments(engine: str, model: FusedLlavaForConditionalGeneration, *, num_processes: int) -> dict[str, Any]:
    """Say what an engine sets.

    Args:
        engine: a name from `ENGINES`.
        model: its language model's blocks are the units that FSDP2 shards.
        num_processes: how many share the run.

    Returns:
        Arguments of transformers' TrainingArguments.
    """
    if num_processes == 1:
        return {}
    if engine == "ddp":
        # Every trained parameter takes part in every step, text-only batches included (FusedLlavaModel.forward).
        return {"ddp_find_unused_parameters": False}
    if engine == "fsdp2":
        blocks = sorted(getattr(model.model.language_model, "_no_split_modules", None) or ())
        settings = json.loads((_FOLDER / "fsdp2.json").read_text(encoding="utf-8"))
        return {"fsdp": True, "fsdp_config": settings | {"transformer_layer_cls_to_wrap": blocks}}
    return {"deepspeed": str(_FOLDER / f"{engine}.json")}


def release_engine(engine: str) -> None:
    """Let models be loaded whole again: after ZeRO-3, transformers would take each apart, together with all processes.

    Args:
        engine: a name from `ENGINES`, of the stage that ended.
    """
    if engine in ("zero2", "zero3"):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def shards(engine: str, *, num_processes: int) -> bool:
    """Tell whether an engine takes the model's parameters apart."""
    return num_processes > 1 and engine in ("fsdp2", "zero3")
