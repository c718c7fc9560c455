"""Train a recipe: build the model, run the stages, leave a folder that can be loaded.

The run's folder holds `recipe.yaml` (every value resolved), `config.json`, `model.safetensors` and the processor, one
`<stage>/adapter.safetensors` per finished stage, `parameters.json` (trainable and frozen, per stage and part),
`metrics.jsonl` (loss of every step) and `logs/` for TensorBoard.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from layerfuse.backbones import create_backbone
from layerfuse.fusers import create_fuser
from layerfuse.preprocessing import Preprocessing

from .checkpoint import load_adapter, save_adapter, save_model, write_text
from .config import PARTS, STAGES, ModelConfig, Recipe, StageConfig
from .data import Collator, ConversationDataset, Sample, check_samples, read_samples
from .model import FusedLlavaForConditionalGeneration, build_model
from .processing import add_image_token, build_processor
from .prompts import TextEncoder, get_template
from .recipe_files import dump_recipe
from .trainer import LlavaTrainer, RunLog

__all__ = ["Assembled", "assemble", "set_trainable", "train"]

_log = logging.getLogger(__name__)

# What a run writes, as far as it must not outlive it; `overwrite` removes these and nothing else.
_RUN_FILES = ("config.json", "model*.safetensors*", "recipe.yaml", "parameters.json", "metrics.jsonl", "logs", *STAGES)


@dataclass(frozen=True)
class Assembled:
    """A model and what belongs to it."""

    model: FusedLlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    image_token_id: int


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    stages: Sequence[str] = STAGES,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Run a recipe.

    Args:
        recipe: what to train, from `load_recipe`.
        output: the run's folder.
        stages: which stages to run, in order.
        adapter: weights of fuser and projector to start from, as an earlier `pretrain` wrote them.
        overwrite: replace an earlier run in the folder.
        callbacks: of transformers' Trainer, for every stage.

    Returns:
        The folder.

    Raises:
        ValueError: if a name is unknown, the data are at fault, or the folder already holds a run.
        FileNotFoundError: if a file of data or the adapter does not exist.
    """
    output = Path(output)
    configs = {name: recipe.stage(name) for name in stages}
    if not overwrite:
        _refuse_used(output)
    samples = {name: _read_and_check(name, config) for name, config in configs.items()}
    set_seed(recipe.pretrain.seed)
    assembled = assemble(recipe.model)
    if adapter is not None:
        load_adapter(assembled.model, ("fuser", "projector"), adapter)
    _clear(output)
    write_text(output / "recipe.yaml", dump_recipe(recipe))
    counts = {}
    for name, config in configs.items():
        counts[name] = set_trainable(assembled.model, config.trainable)
        _log.info("stage %s: %s", name, _describe(counts[name]))
        write_text(output / "parameters.json", json.dumps(counts, indent=2) + "\n")
        _run_stage(name, config, assembled, samples[name], output, callbacks)
        save_adapter(assembled.model, ("fuser", "projector"), output / name / "adapter.safetensors")
    _save(assembled, configs[stages[-1]], output)
    return output


def assemble(config: ModelConfig) -> Assembled:
    """Build the model that a recipe describes.

    Raises:
        ValueError: if a name, layer or option is not possible.
    """
    backbone = create_backbone(
        config.family,
        config.backbone,
        layers=config.layers,
        pretrained=config.backbone_pretrained,
        image_size=config.image_size,
        options=config.backbone_options,
    )
    # Forked, so that runs which differ in nothing but the fuser start from the same projector.
    with torch.random.fork_rng():
        fuser = create_fuser(
            config.fuser, in_channels=backbone.embed_dim, num_layers=len(config.layers), options=config.fuser_options
        )
    tokenizer = AutoTokenizer.from_pretrained(config.llm)
    image_token_id = add_image_token(tokenizer)
    llm = AutoModelForCausalLM.from_pretrained(config.llm, dtype=torch.float32, attn_implementation=config.attention)
    model = build_model(backbone, fuser, llm, image_token_id=image_token_id)
    return Assembled(model, tokenizer, image_token_id)


def set_trainable(model: nn.Module, parts: Sequence[str]) -> dict[str, dict[str, int]]:
    """Let some parts learn and freeze all others.

    Args:
        model: changed in place.
        parts: names from `PARTS`.

    Returns:
        Per part, its number of trainable and of frozen parameters.
    """
    counts = {part: {"trainable": 0, "frozen": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        part = next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))
        parameter.requires_grad_(part in parts)
        counts[part]["trainable" if part in parts else "frozen"] += parameter.numel()
    return counts


def _describe(counts: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{part} {sum(count.values()):,} parameters {'trained' if count['trainable'] else 'frozen'}"
        for part, count in counts.items()
    )


def _refuse_used(output: Path) -> None:
    if (output / "recipe.yaml").exists():
        raise ValueError(f"{output} already holds a run; give another folder, or overwrite it (--overwrite).")


def _clear(output: Path) -> None:
    """Remove what an earlier run wrote, its weights first of all: they would not belong to the new recipe."""
    output.mkdir(parents=True, exist_ok=True)
    for pattern in _RUN_FILES:
        for path in output.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _read_and_check(name: str, config: StageConfig) -> list[Sample]:
    if not config.data.path:
        raise ValueError(
            f"stage {name} has no data; give --{name}.data.path FILE and --{name}.data.image_folder FOLDER."
        )
    samples = read_samples(config.data.path)
    check_samples(
        samples,
        image_folder=config.data.image_folder,
        template=get_template(config.template),
        check_images=config.data.check_images,
    )
    return samples


def _run_stage(
    name: str,
    config: StageConfig,
    assembled: Assembled,
    samples: Sequence[Sample],
    output: Path,
    callbacks: Sequence[TrainerCallback],
) -> None:
    model, tokenizer = assembled.model, assembled.tokenizer
    dataset = ConversationDataset(
        samples,
        image_folder=config.data.image_folder,
        template=get_template(config.template),
        encoder=TextEncoder(tokenizer),
        preprocessing=_preprocessing(model, config),
        image_token_id=assembled.image_token_id,
        num_image_tokens=model.config.image_seq_length,
        max_length=config.data.max_length,
        cache_images=config.data.cache_images,
    )
    # transformers 5.23 renamed it; 5.17 knows only the old name.
    switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if config.gradient_checkpointing:
        getattr(model, f"{switch}_checkpointing_enable")({"use_reentrant": False})
    trainer = LlavaTrainer(
        model=model,
        args=_arguments(config, output / name),
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id),
        learning_rates=config.learning_rates,
        group_by_modality=config.group_by_modality,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunLog(trainer, output, name))
    trainer.train()
    if config.gradient_checkpointing:
        getattr(model, f"{switch}_checkpointing_disable")()


def _arguments(config: StageConfig, folder: Path) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    micro_batch_size, accumulation = config.batches()
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
        save_strategy="no",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        seed=config.seed,
    )


def _preprocessing(model: FusedLlavaForConditionalGeneration, config: StageConfig) -> Preprocessing:
    return dataclasses.replace(model.model.vision_tower.backbone.preprocessing, mode=config.data.image_mode)


def _save(assembled: Assembled, config: StageConfig, output: Path) -> None:
    model, template = assembled.model, get_template(config.template)
    model.config.prompt_template = template.to_dict()
    model.eval()
    save_model(model, build_processor(model, assembled.tokenizer, _preprocessing(model, config), template), output)
