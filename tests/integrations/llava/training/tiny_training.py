"""A model of one weight whose losses are known in advance, and a trainer around it.

A sample is a list of numbers. Supervised tokens cost weight * number, so that a step's loss tells what was averaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments

from integrations.llava.training.loss_guard import NonFiniteLossError
from integrations.llava.training.metrics_log import RunLog
from integrations.llava.training.trainer import LlavaTrainer

__all__ = [
    "BREAKS_GRADIENTS",
    "BREAKS_LOSS",
    "NonFiniteLossError",
    "TinyModel",
    "TinyTrainer",
    "item",
    "read_rows",
    "tiny_trainer",
]

BREAKS_LOSS, BREAKS_GRADIENTS = -1.0, -2.0
"""Numbers that make the loss infinite, and the gradient NaN while the loss is finite."""


class TinyModel(nn.Module):
    """Costs weight * number for every supervised token."""

    accepts_loss_kwargs = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(
        self, *, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Takes what the model takes and nothing else."""
        cost = self.weight * input_ids[:, 1:].abs() * (labels[:, 1:] != -100)
        if (input_ids == BREAKS_LOSS).any():
            cost = cost / 0
        if (input_ids == BREAKS_GRADIENTS).any():
            cost = cost + (0 * self.weight).sqrt()
        return {"loss": cost.sum() / num_items_in_batch}


def item(name: str, *numbers: float, supervised: int | None = None, skipped: str | None = None) -> dict[str, Any]:
    """A sample of numbers, of which the last few are supervised (all but the first, if not said otherwise)."""
    ids = torch.tensor([0.0, *numbers])
    labels = torch.full((len(ids),), -100)
    count = len(numbers) if supervised is None else supervised
    labels[len(ids) - count :] = 1
    return {"id": name, "input_ids": ids, "labels": labels} | ({"skipped": skipped} if skipped else {})


def _collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pad = torch.nn.utils.rnn.pad_sequence
    batch: dict[str, Any] = {
        "input_ids": pad([sample["input_ids"] for sample in samples], batch_first=True),
        "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
        "sample_ids": [sample["id"] for sample in samples],
    }
    skipped = [sample["skipped"] for sample in samples if "skipped" in sample]
    return batch | ({"skipped": skipped} if skipped else {})


class TinyTrainer(LlavaTrainer):
    """Takes samples in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)


def tiny_trainer(
    folder: Path,
    samples: Sequence[Mapping[str, Any]],
    *,
    loss_average: Any = "micro_batch",
    callbacks: Sequence[TrainerCallback] = (),
    report_to: Sequence[str] = (),
    **arguments: Any,
) -> TinyTrainer:
    """A trainer with its log, which steps over one sample at a time, without momentum."""
    given = {
        "output_dir": str(folder / "tiny"),
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "learning_rate": 0.125,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "remove_unused_columns": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    } | arguments
    trainer = TinyTrainer(
        model=TinyModel(),
        args=TrainingArguments(**given),
        train_dataset=list(samples),
        data_collator=_collate,
        loss_average=loss_average,
        callbacks=list(callbacks),
    )
    trainer.add_callback(RunLog(trainer, folder, "tiny", report_to=report_to))
    return trainer


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Every line of the run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
