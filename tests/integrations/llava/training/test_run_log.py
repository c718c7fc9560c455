"""The log of a run: complete at every checkpoint, continued without gap or repetition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from integrations.llava.training.run_folder import RunFolder
from tests.integrations.llava.training.tiny_training import TinyTrainer, item, read_rows, tiny_trainer

SAMPLES = [item(name, number / 7) for number, name in enumerate("abcdefghij", start=1)]
SAMPLES[2]["skipped"] = "c: missing"


class _KilledError(Exception):
    """What stands for a kill."""


class _KilledAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise _KilledError


def trainer(folder: Path, log_every: int, *callbacks: TrainerCallback) -> TinyTrainer:
    return tiny_trainer(
        folder, SAMPLES, callbacks=callbacks, logging_steps=log_every, save_strategy="steps", save_steps=2
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder, 1).train()
    return read_rows(folder)


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_an_interrupted_run_that_went_on_has_the_log_of_one_that_was_not(
    log_every: int, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(_KilledError):
        trainer(tmp_path, log_every, _KilledAt(5)).train()
    assert [row["step"] for row in read_rows(tmp_path)] == ([1, 2, 3, 4, 5] if log_every == 1 else [1, 2, 3, 4])

    trainer(tmp_path, log_every).train(resume_from_checkpoint=str(tmp_path / "tiny" / "checkpoint-4"))

    assert read_rows(tmp_path) == uninterrupted
    assert [row["step"] for row in uninterrupted] == list(range(1, 11))


def test_losses_are_written_with_all_their_digits(uninterrupted: list[dict[str, Any]]) -> None:
    assert uninterrupted[0]["loss"] == float(torch.tensor(1 / 7)) != round(1 / 7, 8)


def test_a_stage_that_begins_anew_drops_its_own_lines_only(tmp_path: Path) -> None:
    other = {"stage": "pretrain", "step": 7, "loss": 1.5}
    # An evaluation before the first step is made again, too.
    logged = [other, {"stage": "tiny", "step": 0, "eval_loss": 2.5}, other | {"stage": "tiny"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    trainer(tmp_path, 1).train()

    rows = read_rows(tmp_path)
    assert rows[0] == other
    assert [(row["stage"], row["step"]) for row in rows[1:]] == [("tiny", step) for step in range(1, 11)]


@pytest.mark.parametrize("torn", ['{"stage": "tiny", "st', '{"stage": "tiny", "step": 1, "loss": 2.0}'])
def test_a_line_that_was_cut_off_is_left_out(torn: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 1, "loss": 1.5}\n' + torn)
    trainer(tmp_path, 1).train()

    assert [row["stage"] for row in read_rows(tmp_path)] == ["pretrain", *["tiny"] * 10]


@pytest.mark.parametrize(("torn", "steps"), [('{"stage": "tiny", "st', 3), ('{"stage": "tiny", "step": 4}', 4)])
def test_a_run_folder_counts_whole_lines_only(torn: str, steps: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "other", "step": 9}\n{"stage": "tiny", "step": 3}\n' + torn)
    assert RunFolder(tmp_path).logged_steps("tiny") == steps

    path.write_text('{"stage": "tiny", "step": 3}\n{"stage"\n{"stage": "tiny", "step": 4}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        RunFolder(tmp_path).logged_steps("tiny")


def test_skipped_samples_are_counted_over_all_starts_of_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(_KilledError):
        trainer(tmp_path, 1, _KilledAt(5)).train()
    caplog.clear()
    trainer(tmp_path, 1).train(resume_from_checkpoint=str(tmp_path / "tiny" / "checkpoint-4"))

    assert [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()] == [
        "stage tiny: 1 samples were skipped"
    ]


def test_every_step_is_a_point_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_trainer(tmp_path, SAMPLES, logging_steps=4, report_to=["tensorboard"]).train()
    events = EventAccumulator(str(tmp_path / "logs" / "tiny")).Reload()

    assert {f"train/{key}" for key in ("loss", "learning_rate", "grad_norm", "skipped")} == set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))


class _Reporter(TrainerCallback):
    """Notes what it is told, as W&B and the like do."""

    told: ClassVar[list[tuple[str, int, dict[str, float]]]] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.told.append(("begin", state.global_step, {}))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.told.append(("log", state.global_step, given["logs"]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.told.append(("end", state.global_step, {}))


def test_a_reporter_of_transformers_is_told_every_step_once_the_first_is_made(
    uninterrupted: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", _Reporter)
    _Reporter.told.clear()
    with pytest.raises(_KilledError):
        tiny_trainer(tmp_path, SAMPLES, callbacks=[_KilledAt(0)], report_to=["wandb"]).train()
    assert not _Reporter.told
    tiny_trainer(tmp_path, SAMPLES, logging_steps=4, report_to=["wandb"]).train()

    (begin, _, _), *steps, end = _Reporter.told
    assert (begin, end) == ("begin", ("end", 10, {}))
    losses = [(kind, step, told["loss"]) for kind, step, told in steps]
    assert losses == [("log", row["step"], row["loss"]) for row in uninterrupted]
    assert not (tmp_path / "logs").exists()
