"""Checks of a plan before its data are read: names, packages, settings.

Every stage is built on the meta device and its TrainingArguments are made, so that what is wrong with the second stage
is not found after the first one's hours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import SchedulerType, get_scheduler

from integrations.llava.config import StageConfig
from integrations.llava.modeling import build_recipe_model, quantization_config, read_language_files
from integrations.llava.prompts import get_template
from layerfuse.errors import InputError, MissingPackageError, UserError
from layerfuse.registry import unknown_name_message

from .engines import check_engine, forget_engine
from .metrics_log import check_reporters
from .plan import Plan
from .trainer import training_arguments

__all__ = ["check_plan"]


def check_plan(plan: Plan) -> None:
    """Build every stage without allocating it, and all that its training is told; nothing is written.

    Raises:
        ValueError: if something in the recipe is not possible; the stage is named.
        ImportError: if a package is missing.
    """
    recipe, num_processes = plan.recipe, plan.process.num_processes
    check_reporters(recipe.report_to)
    for name in plan.left:
        with _named(name):
            config = recipe.stage(name)
            config.batches(num_processes)
            cpu, quantized = plan.process.device.type == "cpu", config.lora.quantize != "none"
            check_engine(config.engine, num_processes=num_processes, cpu=cpu, quantized=quantized)
            get_template(config.template)
            _check_scheduler(config)
            if quantization_config(config.lora.quantize, torch.float32) and not recipe.model.llm_pretrained:
                raise InputError("quantised weights need a pretrained language model; set model.llm_pretrained.")
            if not config.data.path:
                raise InputError(f"no data; give --{name}.data.path FILE and --{name}.data.image_folder FOLDER.")
    files = read_language_files(recipe.model)
    for name in plan.left:
        with _named(name):
            config = recipe.stage(name)
            model = build_recipe_model(recipe.model, files, config, device="meta")
            try:
                training_arguments(config, plan.folder.path / name, model, num_processes)
            except UserError:
                raise
            except (ValueError, ImportError) as error:
                raise InputError(f"transformers cannot train with these settings: {error}") from error
            finally:
                forget_engine()


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Put the stage's name in front of what is wrong with it."""
    try:
        yield
    except (MissingPackageError, InputError) as error:
        kind = MissingPackageError if isinstance(error, MissingPackageError) else InputError
        raise kind(f"stage {stage}: {error}") from error


def _check_scheduler(config: StageConfig) -> None:
    known = {kind.value for kind in SchedulerType} - {SchedulerType.REDUCE_ON_PLATEAU.value}
    if config.scheduler not in known:
        raise InputError(unknown_name_message("scheduler", config.scheduler, known))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        get_scheduler(config.scheduler, optimizer, num_warmup_steps=1, num_training_steps=4)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"scheduler {config.scheduler!r} wants settings that a recipe does not have ({error}); take another, such "
            "as cosine, linear or constant_with_warmup."
        ) from error
