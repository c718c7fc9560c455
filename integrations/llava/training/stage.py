"""One stage of a run: build the model, train it, keep what it learned."""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava.checkpoints import load_adapter, save_adapter, save_model
from integrations.llava.config import Recipe, StageConfig
from integrations.llava.data import Sample
from integrations.llava.modeling import (
    Assembled,
    FusedLlavaForConditionalGeneration,
    assemble,
    build_processor,
    end_answers,
)
from integrations.llava.prompts import get_template
from layerfuse.errors import FileAccessError, InputError
from layerfuse.files import check_disk_space

from .arguments import preprocessing_of, stage_trainer
from .distributed import any_process, on_main
from .engines import forget_engine, shards
from .preflight import Connector, find_connector
from .resume import checkpoints, load_trained, state_bytes, trained_state
from .run_folder import RunFolder
from .signals import RunInterrupted, StopOnSignal, StopRequest
from .trainer import LlavaTrainer

__all__ = ["Run", "StageData", "run_stage"]

_log = logging.getLogger(__name__)

_CONNECTOR = ("fuser", "projector")


@dataclass(frozen=True)
class StageData:
    """The samples of a stage.

    Attributes:
        samples: those that can be used.
        left_out: how many cannot.
        digest: of the samples' text, in their order.
        lengths: of the samples, if batches are grouped by them.
    """

    samples: Sequence[Sample]
    left_out: int
    digest: str
    lengths: np.ndarray | None


@dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        recipe: what is trained.
        folder: of the run.
        data: by stage.
        asked: stages asked for, in order.
        left: those that are run.
        adapter: what the first stage asked for starts from: a file, `RANDOM`, or None.
        overwrite: whether earlier results of the stages are replaced.
        callbacks: of transformers' Trainer.
        request: whether this process was asked to stop.
        state: which process this is.
    """

    recipe: Recipe
    folder: RunFolder
    data: Mapping[str, StageData]
    asked: Sequence[str]
    left: Sequence[str]
    adapter: str | Path | None
    overwrite: bool
    callbacks: Sequence[TrainerCallback]
    request: StopRequest
    state: PartialState


def run_stage(run: Run, name: str) -> None:
    """Train a stage, or go on with it, and save what it learned.

    Args:
        run: that it belongs to; the stages before it are finished.
        name: of the stage.

    Raises:
        RunInterrupted: if the run was told to stop.
    """
    last, config, data = name == run.left[-1], run.recipe.stage(name), run.data[name]
    if any_process(run.request.received):
        raise RunInterrupted(
            f"stopped on request before stage {name}; start the same command again to go on.", run.request.exit_code
        )
    with run.request.at_once():
        # What an earlier stage left behind: its engine's settings, and a model in reference cycles.
        forget_engine()
        gc.collect()
        torch.cuda.empty_cache()
        connector, checkpoint = _seen_by_all(run, name)
        assembled = _assemble(run, name, connector)
        _log.info("stage %s: %s", name, _describe(assembled.counts))
        on_main(lambda: _check_room(run, name, assembled.model, last=last))
        stop, claim = StopOnSignal(run.request), _Claim(run, name, connector, assembled)
        trainer = stage_trainer(
            assembled,
            config,
            data.samples,
            None if data.lengths is None else data.lengths.tolist(),
            run.folder.path / name,
            num_processes=run.state.num_processes,
            callbacks=[*run.callbacks, stop, claim],
        )
        _say_where_it_begins(run, name, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped:
        raise RunInterrupted(
            f"stage {name} stopped on request at step {trainer.state.global_step} of {trainer.state.max_steps}; start "
            "the same command again to go on.",
            run.request.exit_code,
        )
    if data.left_out:
        _log.warning("stage %s: %d bad samples of its data had been left out", name, data.left_out)
    trained = _trained_apart(run, config, trainer)
    forget_engine()
    on_main(lambda: _finish(run, name, assembled, trained, connector, last=last))


class _Claim(TrainerCallback):
    """Makes the folder this run's once the stage has made a step: a run that never makes one changes nothing."""

    def __init__(self, run: Run, name: str, connector: Connector, assembled: Assembled) -> None:
        self.run, self.name, self.connector, self.counts = run, name, connector, assembled.counts
        self.done = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write what the folder has to know, after the first step."""
        run = self.run
        if self.done or not state.is_world_process_zero:
            return
        self.done = True
        data = run.data[self.name]
        run.folder.claim(
            run.recipe,
            self.name,
            samples=(len(data.samples), data.digest),
            origin=self.connector.note,
            parameters=self.counts,
            # All at once: what comes after a stage that is trained anew does not belong to it any more.
            replaces=run.left if run.overwrite and self.name == run.left[0] else (),
        )


def _seen_by_all(run: Run, name: str) -> tuple[Connector, Path | None]:
    """Let the main process say what the stage starts from; all have to see it."""

    def look() -> tuple[Connector | None, Path | None]:
        options = {"asked": run.asked, "left": run.left, "adapter": run.adapter}
        fresh = run.overwrite and name == run.left[0]
        connector = find_connector(run.folder, name, overwrite=fresh, **options)  # type: ignore[arg-type]
        return connector, None if fresh else run.folder.checkpoint(name)

    connector, checkpoint = on_main(look)
    assert connector is not None
    needed = [path for path in (connector.path, checkpoint) if path is not None]
    if any_process(not all(path.exists() for path in needed)):
        raise InputError(
            f"not every process sees {', '.join(map(str, needed))}; put the run's folder on a disk that all machines "
            "share (--output)."
        )
    return connector, checkpoint


def _assemble(run: Run, name: str, connector: Connector, *, quantized: bool = True) -> Assembled:
    """Build the model as the stage begins with it, the same whenever it is built."""
    config = run.recipe.stage(name)
    assembled = assemble(run.recipe.model, config, quantized=quantized, seed=run.recipe.pretrain.seed)
    if connector.path is not None:
        parts = _CONNECTOR if connector.before is None else _kept(run.recipe.stage(connector.before))
        load_adapter(assembled.model, parts, connector.path)
    return assembled


def _kept(config: StageConfig) -> tuple[str, ...]:
    """Name the parts that a stage's adapter file holds."""
    return (*_CONNECTOR, "backbone") if "backbone" in config.trainable else _CONNECTOR


def _check_room(run: Run, name: str, model: FusedLlavaForConditionalGeneration, *, last: bool) -> None:
    config, folder = run.recipe.stage(name), run.folder
    written = checkpoints(folder.path / name)
    needed = max(config.keep_checkpoints + 1 - len(written), 1) * state_bytes(model)
    if last:
        size = 2 if config.precision == "bf16" else 4
        needed += size * sum(parameter.numel() for parameter in model.parameters())
    if run.overwrite and name == run.left[0]:
        needed -= folder.bytes_replaced(run.left)
    check_disk_space(folder.path, needed, f"stage {name} with its checkpoints{' and model' if last else ''}")


def _say_where_it_begins(run: Run, name: str, checkpoint: Path | None) -> None:
    steps = 0 if run.overwrite else run.folder.logged_steps(name)
    if checkpoint is not None:
        _log.info("stage %s goes on from %s", name, checkpoint.name)
    elif steps:
        _log.warning(
            "stage %s begins anew at step 1: an earlier start reached step %d and left no checkpoint (save_every)",
            name,
            steps,
        )
    else:
        _log.info("stage %s begins", name)


def _trained_apart(run: Run, config: StageConfig, trainer: LlavaTrainer) -> dict[str, torch.Tensor] | None:
    """Gather what was trained where the model at hand cannot be saved: taken apart, or of quantised weights."""
    if not shards(config.engine, num_processes=run.state.num_processes) and config.lora.quantize == "none":
        return None
    return trained_state(trainer.model_wrapped, keep=run.state.is_main_process)


def _finish(
    run: Run,
    name: str,
    assembled: Assembled,
    trained: Mapping[str, torch.Tensor] | None,
    connector: Connector,
    *,
    last: bool,
) -> None:
    if trained is not None:
        assembled = _assemble(run, name, connector, quantized=False)
        load_trained(assembled.model, trained)
    try:
        _save(run, name, assembled, last=last)
    except (OSError, SafetensorError) as error:
        raise FileAccessError(
            getattr(error, "errno", None) or errno.EIO,
            f"what stage {name} learned could not be written to {run.folder.path} ({error}); its last checkpoint is "
            "there. Make room or give rights, then start the same command again",
        ) from error
    run.folder.finish(name)


def _save(run: Run, name: str, assembled: Assembled, *, last: bool) -> None:
    config, model = run.recipe.stage(name), assembled.model
    save_adapter(model, _kept(config), run.folder.adapter(name))
    if not last:
        return
    if config.lora.rank:
        from integrations.llava.checkpoints import save_lora
        from integrations.llava.modeling import merge_lora

        save_lora(model, run.folder.path / name / "lora")
        merge_lora(model)
    template = get_template(config.template)
    model.config.prompt_template = template.to_dict()
    end_answers(model.generation_config, assembled.tokenizer, template)
    model.eval().to("cpu")
    if config.precision == "bf16":
        nn.Module.to(model, torch.bfloat16)
    processor = build_processor(model, assembled.tokenizer, preprocessing_of(model, config), template)
    save_model(model, processor, run.folder.path)


def _describe(counts: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{part} {count['trainable']:,} parameters trained, {count['frozen']:,} frozen"
        for part, count in counts.items()
        if sum(count.values())
    )
