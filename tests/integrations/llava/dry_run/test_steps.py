"""Steps: the published numbers, and those that Trainer itself arrives at."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from integrations.llava.config.schema import StageConfig
from integrations.llava.config.yaml_io import load_recipe, recipe_names
from integrations.llava.dry_run.workload import PUBLISHED_SAMPLES, optimizer_steps, samples_seen

STAGE = StageConfig(trainable=("fuser",), template="plain", batch_size=6, micro_batch_size=2)


@pytest.mark.parametrize("num_processes", [1, 2, 4, 8])
@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "tiny"])
def test_published_data_take_2181_and_5198_steps_on_any_number_of_gpus(name: str, num_processes: int) -> None:
    recipe = load_recipe(name)
    steps = [
        optimizer_steps(PUBLISHED_SAMPLES[stage], recipe.stage(stage), num_processes=num_processes)
        for stage in ("pretrain", "finetune")
    ]

    assert steps == [2181, 5198]


class Square(nn.Module):
    """A model with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).square().mean()}


@pytest.mark.parametrize("epochs", [1, 1.5])
@pytest.mark.parametrize("samples", [1, 6, 7, 12, 13])
def test_trainer_makes_as_many_steps(samples: int, epochs: float, tmp_path: Path) -> None:
    config = replace(STAGE, epochs=epochs)
    micro_batch, accumulation = config.batches()
    trainer = Trainer(
        model=Square(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"x": torch.ones(1)} for _ in range(samples)],
    )
    trainer.train()

    assert optimizer_steps(samples, config) == trainer.state.global_step == trainer.state.max_steps


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("samples", [1, 11, 12, 13, 24, 25])
def test_batches_of_one_process_are_those_that_accelerate_deals_out(samples: int, num_processes: int) -> None:
    config = replace(STAGE, batch_size=4 * num_processes)
    micro_batch, accumulation = config.batches(num_processes)
    batches = BatchSampler(SequentialSampler(range(samples)), micro_batch, drop_last=False)
    dealt = len(BatchSamplerShard(batches, num_processes=num_processes, process_index=0))

    assert optimizer_steps(samples, config, num_processes=num_processes) == math.ceil(dealt / accumulation)


def test_max_steps_wins_over_the_data() -> None:
    config = replace(STAGE, max_steps=7, epochs=3)

    assert optimizer_steps(1000, config) == 7
    assert samples_seen(1000, config) == 7 * 6
    assert samples_seen(1000, replace(STAGE, epochs=3)) == 3000
