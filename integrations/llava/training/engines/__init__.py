"""Engines, by which several processes share a run: torch's DDP and FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3.

Their settings are the JSON files beside this one, in the form that transformers documents.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from layerfuse.errors import InputError

__all__ = ["check_engine", "engine_arguments", "forget_engine", "set_precision", "shards"]

_FOLDER = Path(__file__).parent


def check_engine(
    engine: str,
    *,
    num_processes: int,
    cpu: bool,
    quantized: bool = False,
    compiled: bool = False,
    cached: bool = False,
) -> None:
    """Refuse an engine that cannot run on so many processes or on the CPU, and name another.

    Some cannot take quantised weights, compiled parts, or images some of which come from a feature cache.
    """
    if num_processes == 1 or engine == "ddp":
        return
    if quantized and engine in ("fsdp2", "zero3"):
        raise InputError(f"engine {engine!r} cannot take quantised weights apart; use 'ddp' (--finetune.engine ddp).")
    if compiled and engine == "zero3":
        raise InputError(
            "engine 'zero3' takes parameters apart inside backbone and fuser, so that these cannot be compiled; leave "
            "compile out, or use 'fsdp2' (--finetune.engine fsdp2)."
        )
    if cached and engine == "zero3":
        raise InputError(
            "engine 'zero3' puts a backbone's weights together in all processes at once, and would wait for ever where "
            "one encodes an image that the others read from feature_cache; leave feature_cache out, or use 'zero2' or "
            "'fsdp2' (--finetune.engine fsdp2)."
        )
    if engine == "fsdp2" and cpu:
        # accelerate would use DDP without a word.
        raise InputError("engine 'fsdp2' needs GPUs; on CPUs use 'ddp' (--finetune.engine ddp).")
    if engine in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise InputError(f"engine {engine!r} needs DeepSpeed (pip install 'layerfuse[deepspeed]'), or use 'fsdp2'.")


def engine_arguments(engine: str, model: FusedLlavaForConditionalGeneration, *, num_processes: int) -> dict[str, Any]:
    """Arguments of transformers' TrainingArguments that an engine sets; FSDP2 shards the language model's blocks."""
    if num_processes == 1:
        return {}
    if engine == "ddp":
        # Every trained parameter takes part in every step, text-only batches included (FusedLlavaModel.forward).
        return {"ddp_find_unused_parameters": False}
    if engine == "fsdp2":
        blocks = sorted(getattr(model.model.language_model, "_no_split_modules", None) or ())
        settings = json.loads((_FOLDER / "fsdp2.json").read_text(encoding="utf-8"))
        # Else the gradients of every micro batch but the last stay whole on every GPU.
        accumulate = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        return {
            "fsdp": True,
            "fsdp_config": settings | {"transformer_layer_cls_to_wrap": blocks},
            "accelerator_config": accumulate,
        }
    return {"deepspeed": str(_FOLDER / f"{engine}.json")}


def forget_engine() -> None:
    """Undo an engine's settings, so that they do not reach the next stage and models are loaded whole again.

    accelerate remembers FSDP2 and DeepSpeed in the environment; after ZeRO-3, transformers takes every model apart that
    it loads, together with all processes.
    """
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    unset_hf_deepspeed_config()


def set_precision(engine: str, trainer: Trainer) -> None:
    """Let FSDP2 in bf16 sum gradients and give losses in float32, as DDP does; accelerate rounds both to bf16."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if engine == "fsdp2" and plugin is not None and trainer.args.bf16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shards(engine: str, *, num_processes: int) -> bool:
    """Whether an engine takes the model's parameters apart."""
    return num_processes > 1 and engine in ("fsdp2", "zero3")
