"""Going on from the published checkpoint that was recorded, as it came, on data that were recorded with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from integrations.llava.checkpoints import convert, load_model
from integrations.llava.cli import train as train_command
from integrations.llava.training.trainer import LlavaTrainer
from tests.integrations.llava.modeling.model_goldens_support import CASES, PROMPTS, Case, Run

# Samples with and without image in one batch.
SETTINGS = ["--finetune.batch_size", "8", "--finetune.max_steps", "1", "--finetune.group_by_modality", "false"]


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    """Filled by `after`: what the model is given."""
    return []


@pytest.fixture(scope="module")
def after(goldens: Path, batches: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after a step that moves nothing."""
    folder, own = tmp_path_factory.mktemp("from") / "run", LlavaTrainer.get_batch_samples

    def fetch(trainer: LlavaTrainer, *args: Any) -> Any:
        fetched, divisor = own(trainer, *args)
        batches.extend(dict(batch) for batch in fetched)
        return fetched, divisor

    recorded = goldens / "trajectory"
    data = ["--data", str(recorded / "data_stage2.json"), "--image-folder", str(recorded / "images")]
    place = ["--from", str(goldens / "tiny_llava" / "checkpoint"), "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlavaTrainer, "get_batch_samples", fetch)
        assert train_command.main([*place, *data, *SETTINGS, "--finetune.learning_rate", "0"]) == 0
    return folder


def test_the_first_loss_after_going_on_from_goldens_is_our_model_s_on_the_same_ids(
    after: Path, batches: list[dict[str, Any]], goldens: Path, tmp_path: Path
) -> None:
    model = load_model(convert(goldens / "tiny_llava" / "checkpoint", tmp_path / "converted"))
    (batch,) = batches
    with torch.no_grad():
        names = ("input_ids", "attention_mask", "labels", "pixel_values")
        expected = model(**{name: batch[name] for name in names}).loss
    (row,) = [json.loads(line) for line in (after / "metrics.jsonl").read_text().splitlines()]

    assert len(batch["input_ids"]) == 8 and len(batch["pixel_values"]) in range(1, 8)
    assert row["loss"] == pytest.approx(float(expected), rel=0, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_cases_of_goldens_hold_after_going_on(name: str, after: Path) -> None:
    for comparison in Run(after).text(Case(name)):
        comparison.check()


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_of_goldens_hold_after_going_on(name: str, after: Path) -> None:
    for ids, expected, _ in Run(after).answers(name):
        assert ids == expected
