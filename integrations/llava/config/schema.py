"""Recipes as typed data: parts of the model, data and settings of each stage."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, cast, get_args

from layerfuse.errors import InputError
from layerfuse.registry import unknown_name_message

from .limits import Checked, Count, Natural, Positive, Rate, Seed, Share, Within
from .model import InjectionConfig, ModelConfig
from .validation import ValidationConfig

__all__ = [
    "AS_MODEL",
    "ENGINES",
    "PARTS",
    "STAGES",
    "CacheType",
    "DataConfig",
    "InjectionConfig",
    "LoraConfig",
    "ModelConfig",
    "Recipe",
    "StageConfig",
    "ValidationConfig",
]

PARTS: Mapping[str, tuple[str, ...]] = {
    "backbone": ("model.vision_tower.",),
    "fuser": ("model.fuser.",),
    # Mergers of layer injection bring maps to the language model's width as the projector does, and learn with it.
    "projector": ("model.multi_modal_projector.", "model.image_newline", "model.injection."),
    "llm": ("model.language_model.", "lm_head."),
}
"""Parts of the model that a stage can train -> how the names of their parameters begin."""

STAGES = ("pretrain", "finetune")
"""The stages of a run, in order."""

Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]
ENGINES: tuple[str, ...] = get_args(Engine)
"""Ways for several processes to share a run: torch's DDP and FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3."""

CacheType = Literal["fp32", "bf16", "int8"]
"""Types of maps in a feature cache: as computed (float32 at most), bfloat16, or 8 bits with one scale per token."""

_log = logging.getLogger(__name__)

AS_MODEL = "model"
"""Said of a template or an image mode: that of the checkpoint which a run goes on from."""

ImageMode = Literal["pad", "crop", "squash", "model"]


@dataclass(frozen=True)
class DataConfig(Checked):
    """Samples and images of a stage, and how images are brought to the backbone's size.

    Attributes:
        path: file or folder of samples, in any form that docs/data.md lists; a list mixes several, and `a.json:0.5` is
            a share of one, drawn by the stage's seed.
        image_folder: folder that the samples' image names are relative to; none where all images are inside.
        image_mode: pad to a square with the mean colour, crop the centre, or squash; "model" for what the checkpoint
            does that a run goes on from.
        max_length: tokens, images expanded; longer samples are cut.
        upright: turn images as their Exif data say; the published code reads them as stored. Inference always turns.
        cache_images: without effect; taken so that old recipes load.
        check_images: decode every image before training starts; "size" only reads headers, "none" trusts the files.
        bad_samples: "fail" stops at a sample that cannot be used; "skip" leaves it out, counts it and says so.
        max_samples: train on so many samples, taken at equal distances from all of them, whatever the seed; only these
            are checked. None: on all.
    """

    path: str | tuple[str, ...] = ""
    image_folder: str = ""
    image_mode: ImageMode = "pad"
    max_length: Count = 2048
    upright: bool = False
    cache_images: Natural = 0
    check_images: Literal["decode", "size", "none"] = "size"
    bad_samples: Literal["fail", "skip"] = "fail"
    max_samples: Count | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """What `path` names, one or several."""
        return (self.path,) if isinstance(self.path, str) else self.path

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_images:
            _log.warning("data.cache_images has no effect any more, as the cache was hardly ever hit; leave it out.")


@dataclass(frozen=True)
class LoraConfig(Checked):
    """Low-rank adaptation (LoRA, arXiv:2106.09685) of the language model, through peft.

    Attributes:
        rank: of the adapters; 0 trains the language model's own weights.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: share of the adapters' inputs set to zero in training.
        target_modules: names of the linear layers that get an adapter.
        quantize: store the frozen weights in 4 bits ("nf4", QLoRA, arXiv:2305.14314) or 8 bits ("int8"), through
            bitsandbytes.
    """

    rank: Natural = 0
    alpha: Positive = 16.0
    dropout: Share = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    quantize: Literal["none", "int8", "nf4"] = "none"


@dataclass(frozen=True)
class StageConfig(Checked):
    """Settings of one stage of training.

    Attributes:
        trainable: parts that learn; names from `PARTS`. All others are frozen.
        template: name of the prompt template; "tokenizer" for one made of the tokenizer's own chat template; "model"
            for that of the checkpoint that a run goes on from.
        data: the samples.
        validation: held-out samples, on which the stage is measured while it trains.
        lora: train the language model through adapters.
        learning_rate: the peak.
        learning_rates: part -> its peak, where it differs, such as {"fuser": 1e-4}.
        layer_decay: of a backbone that learns: each block's rate is that of the block behind it times this, and the
            embeddings come before the first block; 1 gives all of them one rate.
        batch_size: samples per optimizer step, over all processes.
        micro_batch_size: samples per process at a time; gradients of several are summed until `batch_size` is
            reached. None: as many as one process has to take in a step.
        loss_average: "micro_batch" averages the means of the micro batches, as the published code does; "token"
            weighs every supervised token alike.
        cross_entropy: "chunked" computes logits where labels are, some at a time, "plain" those of all positions at
            once, as zero3 always does; the loss is the same to rounding.
        epochs: passes over the data; ignored if `max_steps` is given.
        max_steps: optimizer steps.
        warmup_ratio: part of the steps over which the learning rate rises.
        optimizer: transformers' name of the optimizer, such as "adafactor" or "adamw_8bit".
        optimizer_options: arguments of its class, such as {"betas": [0.9, 0.95]}.
        weight_decay: for weights outside norms; never for biases.
        scheduler: transformers' name of the learning rate schedule.
        scheduler_options: its own arguments, such as {"min_lr_rate": 0.1} of "cosine_with_min_lr".
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        precision: of the computation. Trained parameters stay float32; frozen ones take the precision's type.
        padding_free: a micro batch's samples stand one after the other in one row, none is filled up to the longest;
            the loss is the same to rounding.
        gradient_checkpointing: recompute the language model's activations, to save memory; "selective" keeps the
            results of matrix products and attention, and recomputes what lies between them.
        compile: let torch compile backbone and fuser; needs a compiler.
        group_by_modality: batch samples of one modality and like lengths together.
        feature_cache: folder of the frozen backbone's feature maps, which runs share: an image that is there is neither
            decoded nor encoded. Empty: none.
        feature_cache_dtype: of the maps in it: "fp32" as they are computed, with equal losses; "bf16" and "int8" (one
            scale per token) are smaller and approximate.
        engine: how several processes share the run; one process needs none.
        save_every: optimizer steps between two checkpoints; None writes one only when the run is told to stop.
        keep_checkpoints: the newest checkpoints that stay while a stage runs.
        num_workers: processes that prepare samples; 0 prepares them in the training process.
        log_every: steps between two log entries; losses are kept for every step.
        trial: let the longest batch go through the model before the first step, so that what does not fit into memory
            is said at once, with the micro batch that does; losses stay the same. None: where a GPU computes.
        trainer_options: other arguments of transformers' TrainingArguments, such as {"neftune_noise_alpha": 5}.
        seed: of the order of samples, dropout and new adapters; `pretrain`'s is also that of the model's parts that are
            not loaded, in both stages.
    """

    trainable: tuple[str, ...]
    template: str
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: Rate = 1e-3
    learning_rates: dict[str, Rate] = field(default_factory=dict)
    layer_decay: Annotated[float, Within(0, 1, above=True)] = 1.0
    batch_size: Count = 16
    micro_batch_size: Count | None = None
    loss_average: Literal["micro_batch", "token"] = "micro_batch"
    cross_entropy: Literal["chunked", "plain"] = "chunked"
    epochs: Positive = 1.0
    max_steps: Count | None = None
    warmup_ratio: Share = 0.03
    optimizer: str = "adamw_torch_fused"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    weight_decay: Rate = 0.0
    scheduler: str = "cosine"
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    max_grad_norm: Rate = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    padding_free: bool = False
    gradient_checkpointing: bool | Literal["selective"] = False
    compile: bool = False
    group_by_modality: bool = False
    feature_cache: str = ""
    feature_cache_dtype: CacheType = "fp32"
    engine: Engine = "ddp"
    save_every: Count | None = None
    keep_checkpoints: Count = 1
    num_workers: Natural = 0
    log_every: Count = 10
    trial: bool | None = None
    trainer_options: dict[str, Any] = field(default_factory=dict)
    seed: Seed = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in (*self.trainable, *self.learning_rates):
            if part not in PARTS:
                raise InputError(unknown_name_message("part", part, PARTS))
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise InputError(
                f"batch_size={self.batch_size} is no multiple of micro_batch_size={self.micro_batch_size}; change one."
            )
        if self.lora.rank and "llm" not in self.trainable:
            raise InputError(f"lora.rank={self.lora.rank}, but 'llm' is not among the trainable parts; add it.")
        if self.lora.quantize != "none" and not self.lora.rank:
            raise InputError(f"lora.quantize={self.lora.quantize!r} needs adapters to train; set lora.rank.")
        if self.layer_decay != 1 and "backbone" not in self.trainable:
            raise InputError(
                f"layer_decay={self.layer_decay} is of a backbone that learns, and 'backbone' is not among the "
                "trainable parts; add it, or leave layer_decay out."
            )
        if self.feature_cache and "backbone" in self.trainable:
            raise InputError(
                "feature_cache keeps the maps of a frozen backbone, and 'backbone' is among the trainable parts, whose "
                "maps change with every step; leave feature_cache out, or train other parts."
            )
        if self.feature_cache_dtype != "fp32" and not self.feature_cache:
            raise InputError(
                f"feature_cache_dtype is {self.feature_cache_dtype!r}, and there is no feature_cache whose maps could "
                "have it; name its folder (feature_cache), or leave feature_cache_dtype out."
            )

    @property
    def logits_in_chunks(self) -> bool:
        """Whether logits are computed by chunks.

        Never with ZeRO-3: its processes gather a module's weights whenever it is called, together, and one that has
        fewer labels calls the head less often.
        """
        return self.cross_entropy == "chunked" and self.engine != "zero3"

    def batches(self, num_processes: int = 1) -> tuple[int, int]:
        """Samples per process at a time, and how many times a process takes them in one optimizer step.

        Raises:
            ValueError: if `batch_size` cannot be divided like that; possible values are named.
        """
        per_process, left = divmod(self.batch_size, num_processes)
        micro = self.micro_batch_size or per_process
        if left or not per_process or per_process % micro:
            raise InputError(
                f"batch_size={self.batch_size} cannot be divided among {num_processes} processes in micro batches of "
                f"{self.micro_batch_size or 'equal size'}; batch_size has to be a multiple of processes times "
                f"micro_batch_size. Set micro_batch_size to a divisor of batch_size / processes."
            )
        return micro, per_process // micro


_PRETRAIN = partial(StageConfig, trainable=("fuser", "projector"), template="plain")
_FINETUNE = partial(
    StageConfig, trainable=("fuser", "projector", "llm"), template="v1", learning_rate=2e-5, group_by_modality=True
)


@dataclass(frozen=True)
class Recipe:
    """Model and stages of a whole run.

    Attributes:
        name: what the recipe is called.
        model: its parts.
        pretrain: first stage: fuser and projector learn.
        finetune: second stage: the language model learns too.
        report_to: transformers' names of the reporters that every step is told to (tensorboard, wandb, mlflow, …), in
            addition to the run's own metrics.jsonl.
    """

    name: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: StageConfig = field(default_factory=_PRETRAIN)
    finetune: StageConfig = field(default_factory=_FINETUNE)
    report_to: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        if "llm" in self.pretrain.trainable:
            raise InputError("stage pretrain cannot train the llm: only finetune keeps it; remove it from trainable.")

    @property
    def default_stages(self) -> tuple[str, ...]:
        """Stages that are meant where none is said: all, or finetune alone where the run goes on from a model."""
        return STAGES[-1:] if self.model.checkpoint else STAGES

    def stage(self, name: str) -> StageConfig:
        """Settings of a stage; a ValueError if there is none of that name."""
        if name not in STAGES:
            raise InputError(unknown_name_message("stage", name, STAGES))
        return cast(StageConfig, getattr(self, name))
