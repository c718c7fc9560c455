"""The trainer of a stage, and what a recipe tells transformers' TrainingArguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from integrations.llava.config import StageConfig
from integrations.llava.data import Collator, ConversationDataset, Sample
from integrations.llava.modeling import Assembled, FusedLlavaForConditionalGeneration, checkpoint_activations
from integrations.llava.prompts import TextEncoder, get_template
from layerfuse.preprocessing import Preprocessing

from .engines import engine_arguments, set_precision
from .metrics_log import RunLog
from .trainer import LlavaTrainer

__all__ = ["preprocessing_of", "stage_trainer", "training_arguments"]


def stage_trainer(
    assembled: Assembled,
    config: StageConfig,
    samples: Sequence[Sample],
    lengths: Sequence[int] | None,
    folder: Path,
    *,
    num_processes: int,
    callbacks: Sequence[TrainerCallback],
) -> LlavaTrainer:
    """Build the trainer of a stage.

    Args:
        assembled: the model as the stage trains it.
        config: of the stage.
        samples: checked.
        lengths: of the samples, where batches are grouped by them.
        folder: of the stage, inside the run's.
        num_processes: how many share the run.
        callbacks: called before the run's log.

    Returns:
        The trainer, which has not begun.
    """
    model, tokenizer = assembled.model, assembled.tokenizer
    dataset = ConversationDataset(
        samples,
        image_folder=config.data.image_folder,
        template=get_template(config.template),
        encoder=TextEncoder(tokenizer),
        preprocessing=preprocessing_of(model, config),
        layout=model.config.layout,
        max_length=config.data.max_length,
        bad_samples=config.data.bad_samples,
    )
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    trainer = LlavaTrainer(
        model=model,
        args=training_arguments(config, folder, model, num_processes),
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id),
        learning_rates=config.learning_rates,
        loss_average=config.loss_average,
        group_by_modality=config.group_by_modality,
        lengths=lengths,
        callbacks=list(callbacks),
    )
    set_precision(config.engine, trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunLog(trainer, folder.parent, folder.name))
    return trainer


def training_arguments(
    config: StageConfig, folder: Path, model: FusedLlavaForConditionalGeneration, num_processes: int
) -> TrainingArguments:
    """Say what a stage tells transformers.

    Args:
        config: of the stage.
        folder: of the stage; not written to.
        model: may be on the meta device; an engine asks it for its blocks.
        num_processes: how many share the run.

    Returns:
        The arguments.

    Raises:
        ValueError, ImportError: what transformers does not take.
    """
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


def preprocessing_of(model: FusedLlavaForConditionalGeneration, config: StageConfig) -> Preprocessing:
    """How a stage brings images to the backbone's size."""
    prepared = model.model.vision_tower.backbone.preprocessing
    return replace(prepared, mode=config.data.image_mode, upright=config.data.upright)
