"""Train a recipe: build the model, run the stages, leave a folder that can be loaded.

Every stage is built from files: the recipe's parts, and what the stage before it left. So a stage runs alike after
another one, in a folder of its own, or when a run that was interrupted goes on. `run_folder` says what a run's folder
holds, `docs/training.md` how runs are spread over processes and continued.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from layerfuse.preprocessing import Preprocessing

from .assembly import Assembled, assemble, assemble_stage, set_trainable
from .atomic import check_disk_space
from .checkpoint import load_adapter, save_adapter, save_model
from .checkpointing import load_trained, state_bytes, trained_state
from .config import STAGES, Recipe, StageConfig
from .data import Collator, ConversationDataset, Sample, read_samples, select_samples, usable_indices
from .engines import check_engine, engine_arguments, release_engine, shards
from .interruption import RunInterrupted, StopOnSignal, StopRequest, stop_requests
from .model import FusedLlavaForConditionalGeneration
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
    state = _process_state(configs)
    left = tuple(configs) if overwrite else folder.open(recipe, stages)
    checked = {name: _read_and_check(name, configs[name], state) for name in left}
    if adapter is not None and not Path(adapter).is_file():
        raise FileNotFoundError(f"adapter {adapter} does not exist; run the stage that writes it first.")
    state.wait_for_everyone()
    if state.is_main_process:
        if overwrite:
            folder.clear()
        folder.begin(recipe)
    state.wait_for_everyone()
    with stop_requests() as request:
        samples = {name: usable for name, (usable, _) in checked.items()}
        left_out = {name: num_problems for name, (_, num_problems) in checked.items()}
        run = _Run(recipe, folder, samples, left_out, Path(adapter) if adapter else None, callbacks, request, state)
        for name in left:
            _run_stage(run, name, last=name == left[-1])
    return folder.path


def _process_state(configs: Mapping[str, StageConfig]) -> PartialState:
    """Join the other processes, and make sure that they can share the work of every stage."""
    cpu = not torch.cuda.is_available()
    for name, config in configs.items():
        if "llm" in config.trainable and name != STAGES[-1]:
            raise ValueError(
                f"stage {name} cannot train the llm: only {STAGES[-1]} keeps it. Remove it from trainable."
            )
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    for config in configs.values():
        config.batches(state.num_processes)
        check_engine(config.engine, num_processes=state.num_processes, cpu=cpu)
    return state


def _read_and_check(name: str, config: StageConfig, state: PartialState) -> tuple[Sequence[Sample], int]:
    if not config.data.path:
        raise ValueError(
            f"stage {name} has no data; give --{name}.data.path FILE and --{name}.data.image_folder FOLDER."
        )
    # The first to open a file writes its index, which the others read.
    with state.main_process_first():
        samples = read_samples(config.data.path)
    usable: list[Any] = [None]
    if state.is_main_process:
        usable[0], _ = usable_indices(
            samples,
            image_folder=config.data.image_folder,
            template=get_template(config.template),
            check_images=config.data.check_images,
            bad_samples=config.data.bad_samples,
        )
    selected = select_samples(samples, broadcast_object_list(usable)[0])
    return selected, len(samples) - len(selected)


def _run_stage(run: _Run, name: str, *, last: bool) -> None:
    config, folder = run.recipe.stage(name), run.folder
    set_seed(run.recipe.pretrain.seed)
    assembled = assemble_stage(run.recipe.model, config)
    model = assembled.model
    _load_earlier(run, name, model)
    counts = set_trainable(model, config.trainable, adapters_only=config.lora.rank > 0)
    _log.info("stage %s: %s", name, _describe(counts))
    if run.state.is_main_process:
        folder.note_parameters(name, counts)
        check_disk_space(folder.path, _bytes_to_write(model, config), f"stage {name} with its checkpoints and model")
    stop = StopOnSignal(run.request)
    trainer = _trainer(run, name, assembled, [*run.callbacks, stop])
    checkpoint = folder.checkpoint(name)
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
    finished = _finished_model(run, name, assembled, trainer)
    if run.state.is_main_process and finished is not None:
        _save_stage(run, name, finished, last=last)
        folder.finish(name)
    run.state.wait_for_everyone()


def _load_earlier(run: _Run, name: str, model: FusedLlavaForConditionalGeneration) -> None:
    """Load what the stage before this one left, or the adapter that was given."""
    before = STAGES[STAGES.index(name) - 1] if STAGES.index(name) else None
    if before in run.folder.finished:
        load_adapter(model, _kept(run.recipe.stage(before)), run.folder.adapter(before))
    elif run.adapter is not None:
        load_adapter(model, _ADAPTER, run.adapter)
    elif before is not None and run.folder.checkpoint(name) is None:
        _log.warning(
            "stage %s starts from a random fuser and projector: no %s was run and no adapter given", name, before
        )


def _kept(config: StageConfig) -> tuple[str, ...]:
    """Name the parts that a stage's adapter file holds."""
    return (*_ADAPTER, *("backbone" for _ in ("backbone",) if "backbone" in config.trainable))


def _bytes_to_write(model: FusedLlavaForConditionalGeneration, config: StageConfig) -> int:
    checkpoints = (config.keep_checkpoints + 1) * state_bytes(model)
    size = 2 if config.precision == "bf16" else 4
    return checkpoints + size * sum(parameter.numel() for parameter in model.parameters())


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
        # transformers 5.23 renamed it; 5.17 knows only the old name.
        switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{switch}_checkpointing_enable")({"use_reentrant": False})
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


def _finished_model(run: _Run, name: str, assembled: Assembled, trainer: LlavaTrainer) -> Assembled | None:
    """Give the main process the trained model, whole and on its own; adapters still apart."""
    config = run.recipe.stage(name)
    sharded = shards(config.engine, num_processes=run.state.num_processes)
    if not sharded and config.lora.quantize == "none":
        return assembled
    trained = trained_state(trainer.model_wrapped, keep=run.state.is_main_process)
    release_engine(config.engine)
    if not run.state.is_main_process:
        return None
    whole = assemble_stage(run.recipe.model, config, quantized=False)
    _load_earlier(run, name, whole.model)
    load_trained(whole.model, trained)
    return whole


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
