"""Settings that transformers has names for: schedule, optimizer and other TrainingArguments, looked at by name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from integrations.llava.config import StageConfig, decode
from layerfuse.errors import InputError
from layerfuse.registry import unknown_name_message

__all__ = ["check_optimizer_name", "check_scheduler", "check_trainer_options"]

# They wait for the numbers of an evaluation.
_NEED_EVALUATION = {"reduce_lr_on_plateau", "greedy"}
# transformers leaves their options out without a word.
_WITHOUT_OPTIONS = {"constant", "constant_with_warmup"}

# Arguments that the trainer follows, and a recipe has no key for.
_OPTIONS = (
    "neftune_noise_alpha",
    "torch_empty_cache_steps",
    "tf32",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
)
# Argument of TrainingArguments -> key of a recipe, where they differ.
_KEYS: Mapping[str, str] = {
    "output_dir": "--output",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "lr_scheduler_type": "scheduler",
    "lr_scheduler_kwargs": "scheduler_options",
    "warmup_steps": "warmup_ratio",
    "bf16": "precision",
    "fp16": "precision",
    "activation_checkpointing": "gradient_checkpointing",
    "torch_compile": "compile",
    "fsdp": "engine",
    "fsdp_config": "engine",
    "deepspeed": "engine",
    "train_sampling_strategy": "group_by_modality",
    "average_tokens_across_devices": "loss_average",
    "dataloader_num_workers": "num_workers",
    "save_strategy": "save_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "logging_steps": "log_every",
    "data_seed": "seed",
    "report_to": "report_to, beside the stages",
} | dict.fromkeys(("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"), "optimizer_options")


def check_optimizer_name(config: StageConfig) -> None:
    """Refuse an optimizer that transformers has no name for with a ValueError that lists its names."""
    known = [kind.value for kind in OptimizerNames]
    if config.optimizer not in known:
        raise InputError(unknown_name_message("optimizer", config.optimizer, known))


def check_trainer_options(config: StageConfig) -> None:
    """Refuse trainer_options that are no arguments of transformers', or not followed by this trainer.

    Raises:
        ValueError: naming what is taken, or the recipe's own key.
    """
    kinds = typing.get_type_hints(TrainingArguments)
    for name, value in config.trainer_options.items():
        _check_option(name, value, kinds)


def check_scheduler(config: StageConfig) -> None:
    """Refuse a schedule that transformers has not, or cannot make with these options, with a ValueError."""
    known = {kind.value for kind in SchedulerType} - _NEED_EVALUATION
    name, options = config.scheduler, dict(config.scheduler_options)
    if name not in known:
        raise InputError(unknown_name_message("scheduler", name, known))
    if options and name in _WITHOUT_OPTIONS:
        raise InputError(f"scheduler {name!r} takes no scheduler_options, and has {options}; leave them out.")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        get_scheduler(
            name, optimizer, num_warmup_steps=1, num_training_steps=4, scheduler_specific_kwargs=options or None
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"scheduler {name!r} cannot be made with scheduler_options={options} ({error}); give the settings that it "
            "wants there, or take another, such as cosine, linear or constant_with_warmup."
        ) from error


def _check_option(name: str, value: Any, kinds: Mapping[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    if name not in fields:
        raise InputError(unknown_name_message("argument of TrainingArguments in trainer_options", name, _OPTIONS))
    own = {field.name for field in dataclasses.fields(StageConfig)}
    if key := _KEYS.get(name, name if name in own else None):
        raise InputError(f"trainer_options has {name!r}, which the recipe sets by a key of its own: {key}.")
    if name not in _OPTIONS:
        raise InputError(
            f"trainer_options has {name!r}, which this trainer does not follow or was never tried with; it takes "
            f"{', '.join(_OPTIONS)}."
        )
    decode(kinds[name], value, f"trainer_options.{name}")
