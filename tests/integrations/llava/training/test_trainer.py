"""Parameter groups, what a loss is averaged over, and the guard against broken numbers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import TrainingArguments

from integrations.llava.training.loss_guard import NonFiniteLossError
from integrations.llava.training.metrics_log import RunLog
from integrations.llava.training.optimizer import parameter_groups
from tests.integrations.llava.training.process_pairs import Nursery
from tests.integrations.llava.training.tiny_training import (
    BREAKS_GRADIENTS,
    BREAKS_LOSS,
    TinyModel,
    TinyTrainer,
    item,
    read_rows,
    tiny_trainer,
)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "fuser": nn.ModuleDict({"attention": nn.Linear(2, 2), "query_norm": nn.LayerNorm(2)}),
                "multi_modal_projector": nn.Linear(2, 2),
                "language_model": nn.ModuleDict({"norm": nn.RMSNorm(2), "frozen": nn.Linear(2, 2)}),
            }
        )
        self.model["language_model"]["frozen"].requires_grad_(False)


def groups_of(learning_rates: dict[str, float] | None) -> list[tuple[float, float, list[str]]]:
    groups = parameter_groups(_Model(), learning_rate=1.0, learning_rates=learning_rates, weight_decay=0.1)
    return [(group["lr"], group["weight_decay"], group["names"]) for group in groups]


def test_biases_and_norms_are_not_decayed_and_frozen_parameters_left_out() -> None:
    assert groups_of(None) == [
        (1.0, 0.1, ["model.fuser.attention.weight", "model.multi_modal_projector.weight"]),
        (
            1.0,
            0.0,
            [
                "model.fuser.attention.bias",
                "model.fuser.query_norm.weight",
                "model.fuser.query_norm.bias",
                "model.multi_modal_projector.bias",
                "model.language_model.norm.weight",
            ],
        ),
    ]


def test_the_fuser_has_a_learning_rate_of_its_own() -> None:
    assert [(rate, decay) for rate, decay, _ in groups_of({"fuser": 0.5})] == [
        (1.0, 0.1),
        (1.0, 0.0),
        (0.5, 0.1),
        (0.5, 0.0),
    ]
    assert groups_of({"fuser": 0.5})[2][2] == ["model.fuser.attention.weight"]


def train_tiny(folder: Path, *samples: dict[str, Any], **arguments: Any) -> list[dict[str, Any]]:
    tiny_trainer(folder, samples, **arguments).train()
    return read_rows(folder)


@pytest.mark.parametrize(("loss_average", "expected"), [("micro_batch", (2 + 5) / 2), ("token", (1 + 3 + 5) / 3)])
def test_a_steps_loss_and_gradient_are_averaged_as_asked(loss_average: str, expected: float, tmp_path: Path) -> None:
    samples = item("a", 1, 3), item("b", 5)
    (row,) = train_tiny(tmp_path, *samples, loss_average=loss_average, gradient_accumulation_steps=2)

    assert row == {
        "stage": "tiny",
        "step": 1,
        "loss": pytest.approx(expected),
        "learning_rate": 0.125,
        "grad_norm": pytest.approx(expected),
    }


@pytest.mark.parametrize(("loss_average", "expected"), [("micro_batch", 1.0), ("token", 2.0)])
def test_a_micro_batch_in_which_nothing_is_supervised_has_loss_zero(
    loss_average: str, expected: float, tmp_path: Path
) -> None:
    samples = item("a", 7, supervised=0), item("b", 2)
    (row,) = train_tiny(tmp_path, *samples, loss_average=loss_average, gradient_accumulation_steps=2)

    assert row["loss"] == pytest.approx(expected)
    assert row["grad_norm"] == pytest.approx(expected)


@pytest.mark.parametrize("loss_average", ["micro_batch", "token"])
def test_a_step_in_which_nothing_is_supervised_changes_nothing(loss_average: str, tmp_path: Path) -> None:
    (row,) = train_tiny(tmp_path, item("a", 7, supervised=0), loss_average=loss_average)

    assert (row["loss"], row["grad_norm"]) == (0, 0)


def test_the_last_step_of_an_epoch_averages_over_the_micro_batches_it_has(tmp_path: Path) -> None:
    samples = [item(name, number) for name, number in (("a", 2), ("b", 4), ("c", 6))]
    rows = train_tiny(tmp_path, *samples, gradient_accumulation_steps=2, learning_rate=0.0)

    assert [row["loss"] for row in rows] == pytest.approx([3, 6])


def test_skipped_samples_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = item("a", 2), item("b", supervised=0, skipped="b: image x.png: missing"), item("c", 4)
    with caplog.at_level(logging.WARNING, logger="integrations.llava"):
        rows = train_tiny(tmp_path, *samples)

    assert [row.get("skipped") for row in rows] == [None, 1, None]
    assert [record.getMessage() for record in caplog.records] == [
        "step 2: skipped b: image x.png: missing",
        "stage tiny: 1 samples were skipped",
    ]


def test_an_infinite_loss_stops_the_run_before_the_weights_move_and_names_its_samples(tmp_path: Path) -> None:
    samples = item("a", 1), item("b", 1), item("c", 1), item("bad", BREAKS_LOSS)
    trainer = tiny_trainer(tmp_path, samples, gradient_accumulation_steps=2, logging_steps=10)

    with pytest.raises(NonFiniteLossError, match=r"step 2: the loss is inf in process 0 for samples bad\.") as caught:
        trainer.train()
    assert [(batch.process, batch.sample_ids) for batch in caught.value.batches] == [(0, ("bad",))]
    assert _weight(trainer) == 1 - 0.125
    assert json.loads((tmp_path / "tiny" / "non_finite_loss.json").read_text()) == {
        "step": 2,
        "grad_norm": None,
        "micro_batches": [{"process": 0, "loss": "inf", "sample_ids": ["bad"]}],
    }
    # Steps that were made are written, though it was not their turn yet.
    assert [row["step"] for row in read_rows(tmp_path)] == [1]


def test_broken_gradients_stop_the_run_before_a_checkpoint_is_written(tmp_path: Path) -> None:
    samples = item("a", 1), item("bad", BREAKS_GRADIENTS), item("c", 1)
    trainer = tiny_trainer(tmp_path, samples, logging_steps=10, save_strategy="steps", save_steps=1)

    with pytest.raises(NonFiniteLossError, match=r"step 2: the gradients' norm is nan, though the loss is .* bad\."):
        trainer.train()
    assert [path.name for path in (tmp_path / "tiny").glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((tmp_path / "tiny" / "non_finite_loss.json").read_text())["grad_norm"] == "nan"
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize(("number", "what"), [(BREAKS_LOSS, "the loss"), (BREAKS_GRADIENTS, "the gradients' norm")])
@pytest.mark.parametrize("last", [False, True])
def test_broken_numbers_stop_a_run_that_has_no_log(number: float, what: str, last: bool, tmp_path: Path) -> None:
    samples = [item("a", 1), item("bad", number), *([] if last else [item("c", 1), item("d", 1)])]
    trainer = tiny_trainer(tmp_path, samples, logging_steps=10, save_strategy="steps", save_steps=1)
    trainer.remove_callback(RunLog)

    with pytest.raises(NonFiniteLossError, match=f"step 2: {what} is .* for samples bad"):
        trainer.train()
    assert [path.name for path in (tmp_path / "tiny").glob("checkpoint-*")] == ["checkpoint-1"]


def test_samples_without_ids_break_without_ids(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [item("a", BREAKS_LOSS)])
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: {k: v for k, v in collate(samples).items() if k != "sample_ids"}

    with pytest.raises(NonFiniteLossError, match=r"for samples \(without ids\)"):
        trainer.train()


def _weight(trainer: TinyTrainer) -> float:
    assert isinstance(trainer.model, TinyModel)
    return float(trainer.model.weight.detach())


def test_one_process_uses_one_gpu_and_says_how_to_use_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 4
    TinyTrainer(model=TinyModel(), args=arguments, train_dataset=[item("a", 1)])

    assert arguments.n_gpu == 1
    assert "torchrun --nproc_per_node 4" in caplog.text


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> dict[str, Any]:
    """What `tiny_worker.py` finds when two processes share its runs."""
    folder = tmp_path_factory.mktemp("two")
    ended = nursery.run("tiny_worker:main", str(folder))
    assert [each.code for each in ended] == [0, 0], ended
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert found.keys() == {"micro_batch", "token", "broken-0", "broken-1"}, ended
    return found


@pytest.mark.parametrize(("loss_average", "expected"), [("micro_batch", (2 + 5) / 2), ("token", (1 + 3 + 5) / 3)])
def test_the_logged_loss_is_that_of_all_processes(
    loss_average: str, expected: float, two_processes: dict[str, Any]
) -> None:
    (row,) = two_processes[loss_average]

    assert row["loss"] == pytest.approx(expected)
    assert row["grad_norm"] == pytest.approx(expected)
    assert row["skipped"] == 2


def test_a_loss_that_breaks_in_one_process_stops_all_with_the_ids_of_its_samples(
    two_processes: dict[str, Any],
) -> None:
    for process in (0, 1):
        assert two_processes[f"broken-{process}"] == {
            "message": two_processes["broken-0"]["message"],
            "weight": 1.0,
        }
    assert "inf in process 1 for samples bad." in two_processes["broken-0"]["message"]
