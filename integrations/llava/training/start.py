"""Whether a run can start: its recipe, its folders and the data of all its stages, in one look.

What can be known at the start is said at the start, and all of it: names, packages and settings of every stage, which
are built on the meta device and make their TrainingArguments, so that a fault in the second stage is not found after
the hours of the first; then texts and images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from integrations.llava.modeling import check_compiler, check_packing, quantization_config
from layerfuse.errors import InputError, UserError

from .engines import check_engine, forget_engine
from .metrics_log import check_reporters
from .named_settings import check_optimizer_name, check_scheduler, check_trainer_options
from .optimizer import check_optimizer
from .plan import Plan, find_origin
from .problems import Problems
from .samples import FoundSamples
from .stage import Stage
from .trainer import training_arguments
from .validation import check_validation

__all__ = ["check_start"]

_log = logging.getLogger(__name__)


def check_start(plan: Plan, stages: Sequence[Stage]) -> list[tuple[FoundSamples, np.ndarray | None]]:
    """Find the samples of all stages that are left, and every problem on the way; nothing is written.

    Returns:
        For each stage, what its `find_samples` gives.

    Raises:
        ValueError: with all problems; a single one keeps its class (ImportError where a package is missing, …).
    """
    problems = Problems()
    with problems.of():
        check_reporters(plan.recipe.report_to)
    for name in plan.left:
        for check in _checks(plan, name):
            with problems.of(name):
                check()
    if not all(plan.recipe.stage(name).data.path for name in plan.left):
        # Nothing is there to be looked at, and a language model that may be far away is not looked for.
        problems.raise_any()
    for name in plan.left:
        for look in (_check_validation, _check_quantization):
            with problems.of(name):
                look(plan, name)
        with problems.of(name):
            _build(plan, name, sound=not problems.about(name))
    with problems.of():
        find_origin(plan, plan.left[0])
    if problems:
        so_far = str(problems)
        _log.warning(
            "problems so far (the data are looked at, too, to tell all at once; Ctrl-C ends that):\n%s", so_far
        )
    looked = [stage.find_samples(problems) for stage in stages]
    problems.raise_any()
    return [(found, held_out) for found, held_out in looked if found is not None]


def _checks(plan: Plan, name: str) -> Iterator[Callable[[], object]]:
    """Checks of a stage's settings, each of which may raise a UserError."""
    config, device = plan.recipe.stage(name), plan.process.device
    yield lambda: config.batches(plan.process.num_processes)
    yield lambda: check_engine(
        config.engine,
        num_processes=plan.process.num_processes,
        cpu=device.type == "cpu",
        quantized=config.lora.quantize != "none",
        compiled=config.compile,
        cached=bool(config.feature_cache),
    )
    yield lambda: check_scheduler(config)
    yield lambda: check_optimizer_name(config)
    yield lambda: check_trainer_options(config)
    if config.compile:
        yield lambda: check_compiler(device)
    yield lambda: _check_data_named(plan, name)


def _check_quantization(plan: Plan, name: str) -> None:
    quantize = plan.recipe.stage(name).lora.quantize
    loaded = plan.recipe.model.llm_pretrained or plan.source.has_connector
    if quantization_config(quantize, torch.float32) and not loaded:
        raise InputError("quantised weights need a pretrained language model; set model.llm_pretrained.")


def _check_validation(plan: Plan, name: str) -> None:
    config = plan.recipe.stage(name)
    captions = plan.source.template(config).caption_only
    check_validation(config, () if captions else plan.scores, num_processes=plan.process.num_processes)


def _check_data_named(plan: Plan, name: str) -> None:
    if not plan.recipe.stage(name).data.path:
        raise InputError(f"no data; give --{name}.data.path FILE and --{name}.data.image_folder FOLDER.")


def _build(plan: Plan, name: str, *, sound: bool) -> None:
    """Build a stage's model on the meta device and, if its settings are sound, make its arguments and optimizer."""
    config, num_processes = plan.recipe.stage(name), plan.process.num_processes
    model = plan.source.on_meta(config)
    if config.padding_free:
        check_packing(model.model.language_model)
    if not sound:
        return
    try:
        args = training_arguments(config, plan.folder.path / name, model, num_processes)
        check_optimizer(config, args, plan.process.device, num_processes=num_processes)
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise InputError(f"transformers cannot train with these settings: {error}") from error
    finally:
        forget_engine()
