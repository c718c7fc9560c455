"""What a stage of training asks of a model, wherever it came from: adapters, parts that learn, precisions."""

from __future__ import annotations

import torch

from integrations.llava.config import StageConfig
from layerfuse.errors import InputError

from .lora import add_lora
from .model import FusedLlavaForConditionalGeneration
from .parts import learns, set_trainable

__all__ = ["fit_to_stage", "language_dtype"]


def _frozen_dtype(stage: StageConfig | None) -> torch.dtype:
    return torch.bfloat16 if stage is not None and stage.precision == "bf16" else torch.float32


def language_dtype(stage: StageConfig | None) -> torch.dtype:
    """Type that a stage has its language model in; None is for no stage, and float32."""
    own_weights_learn = stage is not None and "llm" in stage.trainable and not stage.lora.rank
    return torch.float32 if own_weights_learn else _frozen_dtype(stage)


def fit_to_stage(model: FusedLlavaForConditionalGeneration, stage: StageConfig, *, seed: int | None = None) -> None:
    """Add a stage's adapters to a model, which is changed in place, freeze what does not learn, and set precisions.

    Trained parameters are float32, frozen ones have the type the stage computes in.

    Args:
        model: not quantised, but for its language model's linear layers.
        stage: says what learns.
        seed: of new adapters; None: as the random state stands.

    Raises:
        ValueError: if nothing learns, or the adapters are not possible.
        ImportError: if adapters are asked for and peft is not installed.
    """
    from transformers import set_seed  # lies beside what imports peft, and that bitsandbytes: seconds

    if seed is not None:
        set_seed(seed)
    if stage.lora.rank:
        add_lora(model, stage.lora)
    set_trainable(model, stage.trainable, adapters_only=bool(stage.lora.rank))
    if stage.trainable and not learns(model):
        raise InputError(
            f"nothing learns: trainable is {list(stage.trainable)}, and none of it has weights in this model (fuser "
            f"{model.model.fuser.name!r}); add another part, such as projector."
        )
    for parameter in model.parameters():
        # Quantised weights are integers.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else _frozen_dtype(stage))
