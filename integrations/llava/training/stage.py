"""One stage of a run: its data read, its model built, trained, and written into the run's folder."""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from integrations.llava.checkpoints import load_connector
from integrations.llava.config import StageConfig
from integrations.llava.data import (
    Collator,
    ConversationDataset,
    Sample,
    grouping_lengths,
)
from integrations.llava.modeling import (
    Assembled,
    attend_by_sample,
    check_packing,
    checkpoint_activations,
    compile_vision,
)
from integrations.llava.prompts import Template, TextEncoder
from layerfuse.errors import FileAccessError, InputError
from layerfuse.files import check_disk_space

from .best import BestWeights
from .distributed import any_process, on_main
from .engines import forget_engine, set_precision, shards
from .feature_pass import fill_feature_cache
from .held_out import find_held_out, open_held_out
from .metrics_log import RunLog
from .plan import ConnectorOrigin, Plan, find_origin
from .problems import Problems
from .result import CONNECTOR, adapter_parts, stage_preprocessing, stage_processor, write_stage_result
from .resume import checkpoints, load_trained, state_bytes, trained_state
from .samples import FoundSamples, find_samples, open_samples
from .signals import RunInterrupted
from .trainer import LlavaTrainer, training_arguments
from .trial import try_longest
from .validation import Validation

__all__ = ["Stage", "stage_trainer"]

_log = logging.getLogger(__name__)


class Stage(TrainerCallback):
    """A stage of a run: its samples, then `prepare`, `run` and `save` once the stages before it are finished.

    It is also the callback that makes the folder this run's after the first step (a run that never makes one changes
    nothing), and that ends training with a log entry and a checkpoint when any process was asked to stop.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan, self.name, self.config = plan, name, plan.recipe.stage(name)
        self.folder, self.is_last = plan.folder.path / name, name == plan.left[-1]
        self.claimed = self.stopped = False

    @cached_property
    def template(self) -> Template:
        """How samples are written out."""
        return self.plan.source.template(self.config)

    def find_samples(self, problems: Problems) -> tuple[FoundSamples | None, np.ndarray | None]:
        """Read and check the samples, and those held out, which the main process does for all."""
        found = held_out = None
        with problems.of(self.name):
            found = find_samples(self.name, self.config, self.template)
            if not self.plan.overwrite:
                self.plan.folder.check_samples(self.name, len(found.indices), found.digest)
        with problems.of(self.name):
            held_out = find_held_out(self.config, self.template)
        return found, held_out

    def open_samples(self, found: FoundSamples, held_out: np.ndarray | None) -> None:
        """Open the samples that the main process has found."""
        self.samples, self.digest, self.lengths = open_samples(self.config, found), found.digest, found.lengths
        self.num_left_out, self.held_out = found.num_left_out, open_held_out(self.config, held_out)

    def prepare(self) -> None:
        """Build the model and its trainer, from files that an earlier start or stage has left in the folder.

        Raises:
            RunInterrupted: if the run was told to stop.
        """
        request = self.plan.request
        if any_process(request.received):
            raise RunInterrupted(
                f"stopped on request before stage {self.name}; start the same command again to go on.",
                request.exit_code,
            )
        with request.at_once():
            # What an earlier stage left behind: its engine's settings, and a model in reference cycles.
            forget_engine()
            gc.collect()
            torch.cuda.empty_cache()
            self._find_start()
            self.assembled = self._build()
            # Once for all stages, so that a fault of the second is not found after the hours of the first.
            if any(self.plan.recipe.stage(name).padding_free for name in self.plan.left):
                check_packing(self.assembled.model.model.language_model, self.config.precision)
            # Counted before an engine takes parameters apart.
            self.counts = self.assembled.counts
            self._count_images()
            described = "; ".join(
                f"{part} {count['trainable']:,} parameters trained, {count['frozen']:,} frozen"
                for part, count in self.counts.items()
                if sum(count.values())
            )
            _log.info("stage %s: %s", self.name, described)
            on_main(self._check_room)
            self.trainer = stage_trainer(
                self.assembled,
                self.config,
                self.samples,
                self.lengths,
                self.folder,
                num_processes=self.plan.process.num_processes,
                held_out=self.held_out,
                callbacks=[*self.plan.callbacks, self],
                report_to=self.plan.recipe.report_to,
            )
            self._add_validation()
            self._say_where_it_begins()

    def run(self) -> None:
        """Train, or go on from the checkpoint.

        Raises:
            RunInterrupted: if the run was told to stop; its checkpoint is written.
        """
        self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        if self.stopped:
            state = self.trainer.state
            raise RunInterrupted(
                f"stage {self.name} stopped on request at step {state.global_step} of {state.max_steps}; start the "
                "same command again to go on.",
                self.plan.request.exit_code,
            )
        if self.num_left_out:
            _log.warning("stage %s: %d bad samples of its data had been left out", self.name, self.num_left_out)

    def save(self) -> None:
        """Write fuser and projector, after the last stage the whole model, and mark the stage as finished.

        Raises:
            OSError: if it cannot be written; the last checkpoint stays.
        """
        process, trained = self.plan.process, None
        if self.validation is not None and process.is_main_process:
            trained = self.validation.best_weights()
        # A model that is taken apart, or of quantised weights, cannot be saved: another is built, and gets the weights.
        anew = shards(self.config.engine, num_processes=process.num_processes) or self.config.lora.quantize != "none"
        if anew and on_main(lambda: trained is None):
            trained = trained_state(self.trainer.model_wrapped, keep=process.is_main_process)
        forget_engine()
        on_main(lambda: self._finish(trained, anew=anew))
        del self.assembled, self.trainer, self.validation

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Try the longest batch, so that what does not fit is said before the first step."""
        asked = args.device.type == "cuda" if self.config.trial is None else self.config.trial
        if asked and state.global_step < state.max_steps:
            try_longest(self.trainer, self.config, self.name, resumed=self.checkpoint is not None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note samples and origin in the folder after the first step; agree with all processes whether to stop."""
        # A stage at its last step ends by itself.
        if any_process(self.plan.request.received) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True
        if self.claimed or not state.is_world_process_zero:
            return
        self.claimed = True
        self.plan.folder.claim(
            self.plan.recipe,
            self.name,
            samples=(len(self.samples), self.digest),
            origin=self.origin.note,
            parameters=self.counts,
            steps=state.max_steps,
            # All at once: what comes after a stage that is trained anew does not belong to it any more.
            replaces=self.plan.left if self.plan.replaces(self.name) else (),
        )

    def _find_start(self) -> None:
        """Let the main process find origin and checkpoint; all have to see them."""

        def look() -> tuple[ConnectorOrigin | None, Path | None]:
            checkpoint = None if self.plan.replaces(self.name) else self.plan.folder.checkpoint(self.name)
            return find_origin(self.plan, self.name), checkpoint

        origin, self.checkpoint = on_main(look)
        assert origin is not None
        self.origin = origin
        needed = [path for path in (origin.path, self.checkpoint) if path is not None]
        if any_process(not all(path.exists() for path in needed)):
            raise InputError(
                f"not every process sees {', '.join(map(str, needed))}; put the run's folder on a disk that all "
                "machines share (--output)."
            )

    def _add_validation(self) -> None:
        """Let the stage be measured on what was held out for it; scores ask questions, which captions have not."""
        self.validation: Validation | None = None
        scores = () if self.template.caption_only else self.plan.scores
        if self.held_out is not None or scores:
            processor = partial(stage_processor, self.assembled, self.config)
            self.validation = Validation(
                self.trainer, self.config, self.plan.folder.path, self.name, scores=scores, processor=processor
            )
            self.trainer.add_callback(self.validation)

    def _count_images(self) -> None:
        """Where tokens of images depend on their size, say if they may be too many; group batches by them."""
        layout, data = self.assembled.model.config.layout, self.config.data
        if not layout.depends_on_size:
            return
        if (most := layout.num_tokens(layout.largest_size)) > data.max_length:
            _log.warning(
                "an image may take up to %d positions, and data.max_length is %d: a sample whose images do not fit %s",
                most,
                data.max_length,
                "is left out" if data.bad_samples == "skip" else "stops the run",
            )
        if self.lengths is not None:
            self.lengths = on_main(
                lambda: grouping_lengths(self.samples, layout, data.image_folder, upright=data.upright)
            )

    def _build(self, *, quantized: bool = True) -> Assembled:
        """The model as the stage begins with it, the same whenever it is built."""
        recipe, origin = self.plan.recipe, self.origin
        assembled = self.plan.source.assemble(self.config, quantized=quantized, seed=recipe.pretrain.seed)
        if origin.path is not None:
            parts = CONNECTOR if origin.before is None else adapter_parts(recipe.stage(origin.before))
            load_connector(assembled.model, parts, origin.path)
        return assembled

    def _check_room(self) -> None:
        config, model, plan = self.config, self.assembled.model, self.plan
        needed = max(config.keep_checkpoints + 1 - len(checkpoints(self.folder)), 1) * state_bytes(model)
        if self.is_last:
            size = 2 if config.precision == "bf16" else 4
            needed += size * sum(parameter.numel() for parameter in model.parameters())
        if config.validation.keep_best:
            needed += BestWeights.bytes_needed(model, config.keep_checkpoints)
        if plan.replaces(self.name):
            needed -= plan.folder.bytes_replaced(plan.left)
        what = f"stage {self.name} with its checkpoints{' and model' if self.is_last else ''}"
        check_disk_space(plan.folder.path, needed, what)

    def _say_where_it_begins(self) -> None:
        steps = 0 if self.plan.overwrite else self.plan.folder.logged_steps(self.name)
        if self.checkpoint is not None:
            _log.info("stage %s goes on from %s", self.name, self.checkpoint.name)
        elif steps:
            _log.warning(
                "stage %s begins anew at step 1: an earlier start reached step %d and left no checkpoint (save_every)",
                self.name,
                steps,
            )
        else:
            _log.info("stage %s begins", self.name)

    def _finish(self, trained: Mapping[str, torch.Tensor] | None, *, anew: bool) -> None:
        if anew:
            self.assembled = self._build(quantized=False)
        if trained is not None:
            load_trained(self.assembled.model, trained)
        try:
            write_stage_result(self.assembled, self.config, self.plan.folder, self.name, whole_model=self.is_last)
        except (OSError, SafetensorError) as error:
            raise FileAccessError(
                getattr(error, "errno", None) or errno.EIO,
                f"what stage {self.name} learned could not be written to {self.plan.folder.path} ({error}); its last "
                "checkpoint is there. Make room or give rights, then start the same command again",
            ) from error
        self.plan.folder.finish(self.name, best=None if self.validation is None else self.validation.note())


def stage_trainer(
    assembled: Assembled,
    config: StageConfig,
    samples: Sequence[Sample],
    lengths: Sequence[int] | None,
    folder: Path,
    *,
    num_processes: int,
    held_out: Sequence[Sample] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    report_to: Sequence[str] = (),
) -> LlavaTrainer:
    """Trainer of a stage, which writes into `folder`, and its log into the folder around it.

    `lengths` of the samples are for batches that are grouped by them, `held_out` ones for `Validation`. The log is
    called after the callbacks, and finds that they have asked for a checkpoint.
    """
    model, tokenizer = assembled.model, assembled.tokenizer
    dataset = _dataset(assembled, config, samples, config.data.image_folder)
    evaluated = None
    if held_out is not None:
        evaluated = _dataset(assembled, config, held_out, config.validation.image_folder or config.data.image_folder)
    if config.padding_free:
        attend_by_sample(model.model.language_model)
    if config.gradient_checkpointing:
        checkpoint_activations(model, selective=config.gradient_checkpointing == "selective")
    if config.compile:
        compile_vision(model)
    trainer = LlavaTrainer(
        model=model,
        args=training_arguments(config, folder, model, num_processes),
        train_dataset=dataset,
        eval_dataset=evaluated,
        data_collator=Collator(tokenizer.pad_token_id, padding_free=config.padding_free),
        learning_rates=config.learning_rates,
        layer_decay=config.layer_decay,
        optimizer_options=config.optimizer_options,
        loss_average=config.loss_average,
        group_by_modality=config.group_by_modality,
        lengths=lengths,
        # Nothing is generated, so that keys and values need not be kept.
        options={"use_cache": False, "cross_entropy": "chunked" if config.logits_in_chunks else "plain"},
        callbacks=list(callbacks),
    )
    set_precision(config.engine, trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunLog(trainer, folder.parent, folder.name, report_to=report_to))
    return trainer


def _dataset(
    assembled: Assembled, config: StageConfig, samples: Sequence[Sample], image_folder: str
) -> ConversationDataset:
    """A stage's samples, of training or held out, with the maps that its cache has of their images."""
    model, template = assembled.model, assembled.template
    assert template is not None
    dataset = ConversationDataset(
        samples,
        image_folder=image_folder,
        template=template,
        encoder=TextEncoder(assembled.tokenizer, template.control_tokens),
        preprocessing=stage_preprocessing(model, config),
        layout=model.config.layout,
        max_length=config.data.max_length,
        bad_samples=config.data.bad_samples,
        with_condition=model.model.fuser.condition_channels is not None,
    )
    if config.feature_cache:
        fill_feature_cache(model, dataset, config)
    return dataset
