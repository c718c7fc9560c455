"""transformers' Trainer with LLaVA's samplers, learning rates by part, a choice of loss average, and a guard.

The published code takes the mean of each micro batch, then of all micro batches and processes; LLaVA-1.5's numbers come
from that. Trainer without us weighs all supervised tokens of an optimizer step alike.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from integrations.llava.config import StageConfig
from integrations.llava.data import ModalityLengthSampler, ShuffleSampler
from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from integrations.llava.prompts import IGNORE_INDEX
from layerfuse.files import write_text

from .distributed import any_process
from .engines import engine_arguments
from .loss_guard import BrokenBatch, Later, NonFiniteLossError, OptimizerStep
from .optimizer import build_optimizer, parameter_groups
from .out_of_memory import naming_batch
from .resume import CheckpointingTrainer
from .signals import start_deaf

__all__ = ["LlavaTrainer", "num_supervised", "training_arguments"]

_log = logging.getLogger(__name__)


class LlavaTrainer(CheckpointingTrainer):
    """Trainer with LLaVA's samplers, learning rates by part, and two ways to average the loss.

    A batch may carry `sample_ids` and `skipped` (why samples were left out), lists of text; they never reach the model.

    Args:
        args: as for Trainer.
        learning_rates: part -> its peak learning rate; `layer_decay` is of the backbone, see `parameter_groups`.
        optimizer_options: arguments of the optimizer's class.
        loss_average: "micro_batch": micro batches and processes weigh alike, whatever they supervise; "token": every
            supervised token of an optimizer step weighs alike.
        group_by_modality: use `ModalityLengthSampler`.
        lengths: of the samples, for that sampler; None: `lengths` of the data set.
        options: arguments of every call of the model, beside the batch.
        **kwargs: Trainer's.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        learning_rates: Mapping[str, float] | None = None,
        layer_decay: float = 1.0,
        optimizer_options: Mapping[str, Any] | None = None,
        loss_average: Literal["micro_batch", "token"] = "micro_batch",
        group_by_modality: bool = False,
        lengths: Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            _log.warning(
                "%d GPUs are visible, but one process trains on one: use torchrun --nproc_per_node %d to train on all.",
                args.n_gpu,
                args.n_gpu,
            )
            # Else Trainer would wrap the model in DataParallel, which tears images from their texts.
            args._n_gpu = 1
        super().__init__(args=args, **kwargs)
        self.learning_rates, self.layer_decay, self.loss_average = learning_rates, layer_decay, loss_average
        self.optimizer_options = dict(optimizer_options or {})
        self.group_by_modality, self.lengths = group_by_modality, lengths
        self.options = dict(options or {})
        self._step = OptimizerStep(0, 0.0, [])
        self._made: list[OptimizerStep] = []
        # Rows about a step that are no training's, for the log; those of the main process are written.
        self.noted: list[dict[str, float]] = []
        self._unchecked: tuple[OptimizerStep, Later] | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over `parameter_groups`."""
        if self.optimizer is None:
            whole = model if model is not None else self.model
            assert whole is not None
            groups = parameter_groups(
                whole,
                learning_rate=self.args.learning_rate,
                learning_rates=self.learning_rates,
                layer_decay=self.layer_decay,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = build_optimizer(groups, self.args, self.optimizer_options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if not self.group_by_modality:
            return ShuffleSampler(len(dataset), seed=self.args.seed)
        return ModalityLengthSampler(
            dataset.lengths if self.lengths is None else self.lengths,
            batch_size=self.args.train_batch_size,
            # Published: micro batches of one step count as processes, so one step stays within one modality.
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's loader, with worker processes that no signal to stop ends before the step is finished."""
        loader: Any = super().get_train_dataloader()
        # accelerate keeps the loader that starts the workers inside its own.
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = functools.partial(start_deaf, inner.worker_init_fn)
        return loader  # type: ignore[no-any-return]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """Micro batches of an optimizer step, without entries that are not for the model, and their losses' divisor.

        The divisor is the number of supervised tokens over all micro batches and processes, or None where the loss of
        each is its mean.
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            # A run that goes on where it ended has nothing more to do; Trainer would make one step.
            return [], None
        batches = list(itertools.islice(epoch_iterator, num_batches))
        assert self.optimizer is not None
        self._step = OptimizerStep(
            number=self.state.global_step + 1,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            sample_ids=[batch.pop("sample_ids", []) for batch in batches],
        )
        for why in [why for batch in batches for why in batch.pop("skipped", [])]:
            self._step.num_skipped += 1
            _log.warning("step %d: skipped %s", self._step.number, why)
        self._step.num_tokens = sum((_num_tokens(batch) for batch in batches), torch.tensor(0))
        if self.loss_average == "micro_batch":
            return batches, None
        supervised = sum((num_supervised(batch["labels"]) for batch in batches), torch.tensor(0))
        total = self.accelerator.reduce(supervised.to(device), reduction="sum")
        return batches, total.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of a micro batch, 0 if nothing in it is supervised; a step in which any is NaN or infinite is not made.

        The sum of the tokens' losses is divided by `num_items_in_batch`, or by the number of supervised tokens.
        """
        own = num_supervised(inputs["labels"]).clamp(min=1)
        divisor = own if num_items_in_batch is None else num_items_in_batch
        outputs = model(**inputs, **self.options, num_items_in_batch=divisor)
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            # Every engine takes the mean over processes.
            loss = loss * self.accelerator.num_processes
        if model.training:
            self._step.losses.append(loss.detach())
            if self.accelerator.sync_gradients:
                self._step.finite = Later(torch.stack(self._step.losses).isfinite())
                if self.is_deepspeed_enabled:  # makes the step together with the backward pass
                    self._stop_if_loss_broke(self._step)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Go forward and backward with a micro batch, and name it if there is no memory for it."""
        with naming_batch(lambda: self._step, len(self._step.losses), inputs["input_ids"].shape):
            return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Norm of the gradients, for which Trainer asks just before the step; one that may not be made stops here."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Of the step before: its norm came behind its backward pass, and is read where that costs nothing.
        self.stop_if_gradients_broke()
        if not self.is_deepspeed_enabled:
            self._stop_if_loss_broke(self._step)
        self._step.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._made.append(self._step)
        self._unchecked = self._step, Later(torch.as_tensor(self._step.grad_norm))
        return norm

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, and look at the last step's gradients."""
        with naming_batch(lambda: self._step):
            output = super().train(*args, **kwargs)
        self.stop_if_gradients_broke()
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.stop_if_gradients_broke()
        super()._save_checkpoint(model, trial)

    def take_rows(self) -> list[dict[str, float]]:
        """Rows of the log since the last call, of optimizer steps and those in `noted`; every process has to call this.

        `loss` is the step's over all processes; `grad_norm` is left out while it is not known, `skipped` where it is 0.
        `samples` and `tokens`, padding left out, are those of the step.
        """
        steps, self._made = self._made, []
        noted, self.noted = self.noted, []
        if not steps:
            return noted
        losses = [torch.stack(step.losses).float() for step in steps]
        mean = self.loss_average == "micro_batch"
        own = torch.stack([each.mean() if mean else each.sum() for each in losses])
        counts = [[step.num_skipped, sum(map(len, step.sample_ids))] for step in steps]
        tokens = torch.stack([torch.as_tensor(step.num_tokens).to(own) for step in steps])
        own = torch.cat([own[:, None], own.new_tensor(counts), tokens[:, None]], dim=1)
        totals = self.accelerator.reduce(own, reduction="sum").tolist()
        rows = []
        for step, (loss, skipped, samples, tokens) in zip(steps, totals, strict=True):
            row: dict[str, float] = {"step": step.number, "loss": loss / self.accelerator.num_processes}
            row["learning_rate"] = step.learning_rate
            if step.grad_norm is not None:
                row["grad_norm"] = float(step.grad_norm)
            rows.append(row | ({"skipped": int(skipped)} if skipped else {}) | {"samples": samples, "tokens": tokens})
        return sorted(rows + noted, key=lambda row: row["step"])

    def stop_if_gradients_broke(self) -> None:
        """Raise NonFiniteLossError, in every process, if the last step's gradients were NaN or infinite."""
        unchecked, self._unchecked = self._unchecked, None
        if unchecked is not None:
            step, norm = unchecked[0], float(unchecked[1].read())
            if not math.isfinite(norm):
                self._stop(step, range(len(step.losses)), grad_norm=norm)

    def _stop_if_loss_broke(self, step: OptimizerStep) -> None:
        """Read losses that were known when the last forward pass ended, while the device computes the backward pass."""
        assert step.finite is not None
        finite = step.finite.read()
        if any_process(not finite.all()):
            self._stop(step, (~finite).nonzero().flatten().tolist())

    def _stop(self, step: OptimizerStep, indices: Any, *, grad_norm: float | None = None) -> None:
        # Steps that were made but not yet written are written now.
        self.callback_handler.on_log(self.args, self.state, self.control, {})
        own = [
            BrokenBatch(self.args.process_index, float(step.losses[index]), tuple(step.sample_ids[index]))
            for index in indices
        ]
        error = NonFiniteLossError(step.number, gather_object(own), grad_norm=grad_norm)
        if self.is_world_process_zero():
            file = Path(self.args.output_dir or ".") / "non_finite_loss.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(error.to_dict(), indent=2) + "\n")
        raise error


def training_arguments(
    config: StageConfig, folder: Path, model: FusedLlavaForConditionalGeneration, num_processes: int
) -> TrainingArguments:
    """TrainingArguments of a stage, or transformers' ValueError or ImportError; the model may be on the meta device."""
    cuda = torch.cuda.is_available()
    micro_batch_size, accumulation = config.batches(num_processes)
    engine = engine_arguments(config.engine, model, num_processes=num_processes)
    # From pinned memory, without a wait of the host.
    engine["accelerator_config"] = {"non_blocking": cuda, **engine.get("accelerator_config", {})}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        optim=config.optimizer,
        lr_scheduler_type=config.scheduler,
        lr_scheduler_kwargs=dict(config.scheduler_options),
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
        run_name=f"{folder.parent.name}-{folder.name}",
        disable_tqdm=True,
        seed=config.seed,
        **config.trainer_options,
        **engine,
    )


def num_supervised(labels: torch.Tensor) -> torch.Tensor:
    """Number of tokens with a label; the first has none before it that could predict it."""
    return (labels[..., 1:] != IGNORE_INDEX).sum()


def _num_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Number of positions that are no padding."""
    mask = batch.get("attention_mask")
    return torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum()
