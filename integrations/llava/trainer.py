"""transformers' Trainer with a sampler that groups by modality and length, and learning rates by part.

The sampler gives the index lists of the published code (LLaVA-1.5, `llava/train/llava_trainer.py`), its oddity of the
last batches included, so that runs can be compared batch by batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import PARTS

__all__ = ["LlavaTrainer", "ModalityLengthSampler", "RunLog", "modality_length_indices", "parameter_groups"]


def modality_length_indices(
    lengths: Sequence[int], *, batch_size: int, world_size: int = 1, generator: torch.Generator | None = None
) -> list[int]:
    """Order samples so that a global batch holds one modality and like lengths.

    Args:
        lengths: of every sample; negative for samples without image, never 0.
        batch_size: samples per process and step.
        world_size: number of processes.
        generator: source of randomness; the global one if None.

    Returns:
        Every index once.

    Raises:
        ValueError: if a length is 0, since its sign then says nothing.
    """
    if not all(lengths):
        raise ValueError(
            f"sample {list(lengths).index(0)} has length 0; lengths are positive, or negative without image."
        )
    with_image = [index for index, length in enumerate(lengths) if length > 0]
    without = [index for index, length in enumerate(lengths) if length < 0]
    if not with_image or not without:
        # Published: signs stay, so that samples without image come shortest first.
        return _length_grouped(lengths, batch_size, world_size, generator)
    global_batch = batch_size * world_size
    batches: list[list[int]] = []
    rest: list[int] = []
    for indices in (with_image, without):
        order = _length_grouped([abs(lengths[index]) for index in indices], batch_size, world_size, generator)
        ordered = [indices[position] for position in order]
        chunks = [ordered[start : start + global_batch] for start in range(0, len(ordered), global_batch)]
        # Published: the last batch of each modality is set aside, also if it is full.
        rest += chunks.pop()
        batches += chunks
    shuffled = [batches[position] for position in torch.randperm(len(batches), generator=generator).tolist()]
    return [index for batch in [*shuffled, sorted(rest)] for index in batch]


def _length_grouped(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None
) -> list[int]:
    """Shuffle, then deal each global batch out to the processes so that all get about the same number of words."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    global_batch = batch_size * world_size
    dealt: list[int] = []
    for start in range(0, len(order), global_batch):
        batch = sorted(order[start : start + global_batch], key=lambda index: lengths[index], reverse=True)
        for share in _even_shares(batch, lengths, world_size):
            dealt += share
    return dealt


def _even_shares(batch: Sequence[int], lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    if len(batch) % num_shares:
        return [list(batch[share::num_shares]) for share in range(num_shares)]
    size = len(batch) // num_shares
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals: list[float] = [0] * num_shares
    for index in batch:
        smallest = totals.index(min(totals))
        shares[smallest].append(index)
        totals[smallest] = totals[smallest] + lengths[index] if len(shares[smallest]) < size else math.inf
    return shares


class ModalityLengthSampler(Sampler[int]):
    """Yields `modality_length_indices`, anew in every epoch.

    Args:
        lengths: of every sample; negative for samples without image.
        batch_size: samples per process and step.
        world_size: number of processes.
        seed: order of epoch e depends on seed and e only, so that a resumed run meets the same batches.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, world_size: int = 1, seed: int = 0) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; accelerate calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the indices of one epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(
            modality_length_indices(
                self.lengths, batch_size=self.batch_size, world_size=self.world_size, generator=generator
            )
        )


def parameter_groups(
    model: nn.Module, *, learning_rate: float, learning_rates: Mapping[str, float] | None = None, weight_decay: float
) -> list[dict[str, Any]]:
    """Sort trainable parameters into groups: by part, where it has its own learning rate, with or without decay.

    Biases and everything inside norms are never decayed.

    Args:
        model: the whole model.
        learning_rate: peak learning rate.
        learning_rates: part -> its own peak learning rate.
        weight_decay: of the parameters that are decayed.

    Returns:
        Non-empty groups for a torch optimizer; `names` lists the parameters of each.
    """
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    }
    rates = {"": learning_rate, **(learning_rates or {})}
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (part, decayed): {"params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0, "lr": rate}
        for part, rate in rates.items()
        for decayed in (True, False)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next((part for part in rates if part and any(prefix in name for prefix in PARTS[part])), "")
        group = groups[part, name not in norms and "bias" not in name]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


class LlavaTrainer(Trainer):
    """Trainer with LLaVA's sampler and learning rates by part.

    Args:
        learning_rates: part -> its own peak learning rate.
        group_by_modality: use `ModalityLengthSampler`; the data set needs `lengths`.
        **kwargs: Trainer's.
    """

    def __init__(
        self, *, learning_rates: Mapping[str, float] | None = None, group_by_modality: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.learning_rates = learning_rates
        self.group_by_modality = group_by_modality
        self.losses: list[torch.Tensor] = []
        """Loss of every micro batch since the last log entry, not yet brought to the CPU."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW over `parameter_groups`."""
        if self.optimizer is None:
            whole = model if model is not None else self.model
            assert whole is not None
            groups = parameter_groups(
                whole,
                learning_rate=self.args.learning_rate,
                learning_rates=self.learning_rates,
                weight_decay=self.args.weight_decay,
            )
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = cls([{k: v for k, v in group.items() if k != "names"} for group in groups], **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if not self.group_by_modality:
            return super()._get_train_sampler(train_dataset)
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        return ModalityLengthSampler(
            dataset.lengths,
            batch_size=self.args.train_batch_size,
            # Published: micro batches of one step count as processes, so one step stays within one modality.
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        """As Trainer, but a batch in which nothing is supervised divides by one, not by zero."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if isinstance(num_items, torch.Tensor):
            num_items = num_items.clamp(min=1)
        return batches, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer, and keep the loss."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class RunLog(TrainerCallback):
    """Writes every step's loss to a JSON lines file and to TensorBoard, and shows a progress bar in a terminal.

    Args:
        trainer: whose losses are written.
        folder: gets `metrics.jsonl`, appended to, and TensorBoard files under `logs/<stage>`.
        stage: name of the stage, written into every line.
    """

    def __init__(self, trainer: LlavaTrainer, folder: Path, stage: str) -> None:
        self.trainer = trainer
        self.folder = folder
        self.stage = stage
        self.writer: SummaryWriter | None = None
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open bar and files."""
        if state.is_world_process_zero:
            self.writer = SummaryWriter(str(self.folder / "logs" / self.stage))
            self.bar = tqdm(
                total=state.max_steps, desc=self.stage, unit="step", disable=None, initial=state.global_step
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write the steps since the last entry."""
        rows = self._rows(args, state, logs or {})
        if not rows or self.writer is None or self.bar is None:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            for key in row.keys() - {"stage", "step"}:
                self.writer.add_scalar(key, row[key], row["step"])
        self.bar.set_postfix(loss=f"{rows[-1]['loss']:.4f}", refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close bar and files."""
        if self.bar is not None and self.writer is not None:
            self.bar.close()
            self.writer.close()

    def _rows(self, args: TrainingArguments, state: TrainerState, logs: Mapping[str, float]) -> list[dict[str, Any]]:
        kept, self.trainer.losses = self.trainer.losses, []
        if not kept:
            return []
        losses = torch.stack(kept).float().cpu().tolist()
        accumulation = args.gradient_accumulation_steps
        per_step = [sum(losses[start : start + accumulation]) for start in range(0, len(losses), accumulation)]
        first = state.global_step - len(per_step) + 1
        rows: list[dict[str, Any]] = [
            {"stage": self.stage, "step": first + offset, "loss": loss} for offset, loss in enumerate(per_step)
        ]
        rows[-1] |= {key: float(logs[key]) for key in ("learning_rate", "grad_norm", "epoch") if key in logs}
        return rows
