"""Train a recipe: build the model, run the stages, leave a folder that can be loaded.

Every stage is built from files: the recipe's parts, and what the stage before it left. So a stage runs alike after
another one, in a folder of its own, or when a run that was interrupted goes on. `run_folder` says what a run's folder
holds, `docs/training.md` how runs are spread over processes and continued.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import check_disk_space
from layerfuse.preprocessing import Preprocessing

from .assembly import Assembled, assemble, assemble_stage, checkpoint_activations, set_trainable
from .checkpoint import load_adapter, save_adapter, save_model
from .checkpointing import checkpoints, load_trained, state_bytes, trained_state
from .config import STAGES, Recipe, StageConfig
from .data import Collator, ConversationDataset, Sample, read_samples, select_samples, usable_indices
from .engines import check_engine, engine_arguments, forget_engine, set_precision, shards
from .interruption import RunInterrupted, StopOnSignal, StopRequest, stop_requests
from .model import FusedLlavaForConditionalGeneration
from .processes import any_process, on_main
from .processing import build_processor
from .prompts import TextEncoder, get_template
from .run_folder import RunFolder
from .run_log import RunLog
from .trainer import LlavaTrainer

__all__ = ["Assembled", "assemble", "set_trainable", "train"]

_log = logging.getLogger(__name__)

_ADAPTER = ("fuser", "projector")
# Checking the images of a large data set happens in one process while the others wait.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    folder: RunFolder
    samples: Mapping[str, Sequence[Sample]]
    left_out: Mapping[str, int]
    adapter: Path | None
    callbacks: Sequence[TrainerCallback]
    request: StopRequest
    state: PartialState


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    stages: Sequence[str] = STAGES,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Run a recipe, or go on with a run that was interrupted.

    Under `torchrun` or `accelerate launch`, every process calls this.

    Args:
        recipe: what to train, from `load_recipe`.
        output: the run's folder. If it holds an unfinished run of this recipe, that run goes on.
        stages: which stages to run, in order.
        adapter: weights of fuser and projector that the first stage asked for starts from, as an earlier `pretrain`
            wrote them.
        overwrite: replace an earlier run in the folder.
        callbacks: of transformers' Trainer, for every stage.

    Returns:
        The folder.

    Raises:
        ValueError: if a name is unknown, the data are at fault, or the folder already holds another or a finished run.
        FileNotFoundError: if a file of data or the adapter does not exist.
        OSError: if the disk has no room for what the run will write.
        NonFiniteLossError: if a loss or gradient is NaN or infinite; the ids of the samples are in its message.
        RunInterrupted: if SIGTERM or SIGUSR1 arrived; the same call goes on from the step that was reached.
    """
    folder = RunFolder(output)
    configs = {name: recipe.stage(name) for name in stages}
    state = _join_processes(configs)
    left = tuple(configs) if overwrite else on_main(lambda: folder.open(recipe, stages))
    checked = {name: _read_and_check(name, configs[name]) for name in left}
    if adapter is not None and not Path(adapter).is_file():
        raise MissingFileError(f"adapter {adapter} does not exist; run the stage that writes it first.")
    samples = {name: usable for name, (usable, _) in checked.items()}
    on_main(lambda: _begin(folder, recipe, samples, overwrite=overwrite))
    with stop_requests() as request:
        left_out = {name: num_problems for name, (_, num_problems) in checked.items()}
        run = _Run(recipe, folder, samples, left_out, Path(adapter) if adapter else None, callbacks, request, state)
        for name in left:
            if any_process(request.received):
                raise RunInterrupted(f"stopped on request before stage {name}; start the same command again to go on.")
            _run_stage(run, name, last=name == left[-1])
    return folder.path


def _join_processes(configs: Mapping[str, StageConfig]) -> PartialState:
    """Join the other processes, and make sure that they can share the work of every stage."""
    cpu = not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    for config in configs.values():
        config.batches(state.num_processes)
        quantized = config.lora.quantize != "none"
        check_engine(config.engine, num_processes=state.num_processes, cpu=cpu, quantized=quantized)
    return state


def _begin(folder: RunFolder, recipe: Recipe, samples: Mapping[str, Sequence[Sample]], *, overwrite: bool) -> None:
    if overwrite:
        folder.clear()
    folder.begin(recipe)
    for name, usable in samples.items():
        folder.note_samples(name, len(usable))


def _read_and_check(name: str, config: StageConfig) -> tuple[Sequence[Sample], int]:
    """Open a stage's data; returns the samples that can be used, and how many cannot."""
    if not config.data.path:
        raise InputError(
            f"stage {name} has no data; give --{name}.data.path FILE and --{name}.data.image_folder FOLDER."
        )
    # The first to open a file writes its index, which the others read.
    on_main(lambda: len(read_samples(config.data.path)))
    samples = read_samples(config.data.path)
    usable, _ = on_main(
        lambda: usable_indices(
            samples,
            image_folder=config.data.image_folder,
            template=get_template(config.template),
            check_images=config.data.check_images,
            bad_samples=config.data.bad_samples,
        )
    )
    return select_samples(samples, usable), len(samples) - len(usable)


def _run_stage(run: _Run, name: str, *, last: bool) -> None:
    config = run.recipe.stage(name)
    # What an earlier stage left behind: its engine's settings, and a model in reference cycles.
    forget_engine()
    gc.collect()
    torch.cuda.empty_cache()
    set_seed(run.recipe.pretrain.seed)
    finished, checkpoint = _seen_by_all(run, name)
    assembled = assemble_stage(run.recipe.model, config)
    _load_earlier(run, name, assembled.model, finished)
    _log.info("stage %s: %s", name, _describe(assembled.counts))
    on_main(lambda: _prepare_folder(run, name, assembled, last=last))
    stop = StopOnSignal(run.request)
    trainer = _trainer(run, name, assembled, [*run.callbacks, stop])
    if checkpoint is not None:
        _log.info("stage %s goes on from %s", name, checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped:
        raise RunInterrupted(
            f"stage {name} stopped on request at step {trainer.state.global_step} of {trainer.state.max_steps}; start "
            "the same command again to go on."
        )
    if run.left_out[name]:
        _log.warning("stage %s: %d bad samples of its data had been left out", name, run.left_out[name])
    trained = _trained_apart(run, config, trainer)
    forget_engine()
    on_main(lambda: _finish_stage(run, name, assembled, trained, finished, last=last))


def _seen_by_all(run: _Run, name: str) -> tuple[Sequence[str], Path | None]:
    """Let the main process say which stages are finished and which checkpoint is the newest; all have to see them."""
    finished, checkpoint = on_main(lambda: (run.folder.finished, run.folder.checkpoint(name)))
    needed = [run.folder.adapter(stage) for stage in finished] + ([checkpoint] if checkpoint else [])
    if any_process(not all(path.exists() for path in needed)):
        raise InputError(
            f"not every process sees {', '.join(map(str, needed))}; put the run's folder on a disk that all machines "
            "share (--output)."
        )
    return finished, checkpoint


def _prepare_folder(run: _Run, name: str, assembled: Assembled, *, last: bool) -> None:
    config, model, folder = run.recipe.stage(name), assembled.model, run.folder
    folder.note_parameters(name, assembled.counts)
    written = checkpoints(folder.path / name)
    needed = max(config.keep_checkpoints + 1 - len(written), 1) * state_bytes(model)
    if last:
        size = 2 if config.precision == "bf16" else 4
        needed += size * sum(parameter.numel() for parameter in model.parameters())
    check_disk_space(folder.path, needed, f"stage {name} with its checkpoints{' and model' if last else ''}")


def _load_earlier(run: _Run, name: str, model: FusedLlavaForConditionalGeneration, finished: Sequence[str]) -> None:
    """Load what the stage before this one left, or the adapter that was given."""
    before = STAGES[STAGES.index(name) - 1] if STAGES.index(name) else None
    if before is not None and before in finished:
        if run.adapter is not None:
            _log.info("stage %s goes on from this folder's %s; the adapter %s is not read", name, before, run.adapter)
        load_adapter(model, _kept(run.recipe.stage(before)), run.folder.adapter(before))
    elif run.adapter is not None:
        load_adapter(model, _ADAPTER, run.adapter)
    elif before is not None and run.folder.checkpoint(name) is None:
        _log.warning(
            "stage %s starts from a random fuser and projector: no %s was run and no adapter given", name, before
        )


def _kept(config: StageConfig) -> tuple[str, ...]:
    """Name the parts that a stage's adapter file holds."""
    return (*_ADAPTER, "backbone") if "backbone" in config.trainable else _ADAPTER


def _trainer(run: _Run, name: str, assembled: Assembled, callbacks: Sequence[TrainerCallback]) -> LlavaTrainer:
    config, model, tokenizer = run.recipe.stage(name), assembled.model, assembled.tokenizer
    dataset = ConversationDataset(
        run.samples[name],
        image_folder=config.data.image_folder,
        template=get_template(config.template),
        encoder=TextEncoder(tokenizer),
        preprocessing=_preprocessing(model, config),
        image_token_id=assembled.image_token_id,
        num_image_tokens=model.config.image_seq_length,
        max_length=config.data.max_length,
        cache_images=config.data.cache_images,
        bad_samples=config.data.bad_samples,
    )
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    trainer = LlavaTrainer(
        model=model,
        args=_arguments(config, run.folder.path / name, model, run.state.num_processes),
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id),
        learning_rates=config.learning_rates,
        loss_average=config.loss_average,
        group_by_modality=config.group_by_modality,
        callbacks=list(callbacks),
    )
    set_precision(config.engine, trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunLog(trainer, run.folder.path, name))
    return trainer


def _arguments(
    config: StageConfig, folder: Path, model: FusedLlavaForConditionalGeneration, num_processes: int
) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    micro_batch_size, accumulation = config.batches(num_processes)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        use_cpu=not cuda,
        save_strategy="no" if config.save_every is None else "steps",
        save_steps=config.save_every or 0,
        save_total_limit=config.keep_checkpoints,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        seed=config.seed,
        **engine_arguments(config.engine, model, num_processes=num_processes),
    )


def _trained_apart(run: _Run, config: StageConfig, trainer: LlavaTrainer) -> dict[str, torch.Tensor] | None:
    """Gather what was trained where the model at hand cannot be saved: taken apart, or of quantised weights."""
    if not shards(config.engine, num_processes=run.state.num_processes) and config.lora.quantize == "none":
        return None
    return trained_state(trainer.model_wrapped, keep=run.state.is_main_process)


def _finish_stage(
    run: _Run,
    name: str,
    assembled: Assembled,
    trained: Mapping[str, torch.Tensor] | None,
    finished: Sequence[str],
    *,
    last: bool,
) -> None:
    if trained is not None:
        assembled = assemble_stage(run.recipe.model, run.recipe.stage(name), quantized=False)
        _load_earlier(run, name, assembled.model, finished)
        load_trained(assembled.model, trained)
    _save_stage(run, name, assembled, last=last)
    run.folder.finish(name)


def _save_stage(run: _Run, name: str, assembled: Assembled, *, last: bool) -> None:
    config, model = run.recipe.stage(name), assembled.model
    save_adapter(model, _kept(config), run.folder.adapter(name))
    if not last:
        return
    if config.lora.rank:
        from .lora import merge_lora, save_lora

        save_lora(model, run.folder.path / name / "lora")
        merge_lora(model)
    template, preprocessing = get_template(config.template), _preprocessing(model, config)
    model.config.prompt_template = template.to_dict()
    model.eval().to("cpu")
    if config.precision == "bf16":
        nn.Module.to(model, torch.bfloat16)
    save_model(model, build_processor(model, assembled.tokenizer, preprocessing, template), run.folder.path)


def _preprocessing(model: FusedLlavaForConditionalGeneration, config: StageConfig) -> Preprocessing:
    return replace(model.model.vision_tower.backbone.preprocessing, mode=config.data.image_mode)


def _describe(counts: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{part} {count['trainable']:,} parameters trained, {count['frozen']:,} frozen"
        for part, count in counts.items()
        if sum(count.values())
    )
