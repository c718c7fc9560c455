"""Lines for people: what a stage has done, how fast, how long it still takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integrations.llava.training import progress
from integrations.llava.training.progress import Progress, describe_evaluation, describe_seconds
from tests.integrations.llava.training.test_run_log import SAMPLES, _KilledAt, _KilledError, trainer


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def step(number: int, loss: float) -> dict[str, float]:
    return {"step": number, "loss": loss, "learning_rate": 2e-5}


def test_a_line_has_step_mean_loss_speed_memory_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(progress, "peak_memory", lambda: 3 * 2**30)
    made = Progress("finetune", 10, 100)
    for number, loss in ((11, 1.0), (12, 2.0)):
        made.add(step(number, loss), samples=8, tokens=1000)
    clock.now += 4
    assert made.parts() == [
        *(
            "finetune 12/100",
            "loss 1.5000",
            "learning rate 2e-05",
            "4 samples/s",
            "500 tokens/s",
            "3.00 GiB",
            "2:56 left",
        )
    ]
    assert made.parts() is None


def test_the_time_of_an_evaluation_slows_no_line_and_counts_for_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(progress, "peak_memory", lambda: None)
    made = Progress("finetune", 0, 2)
    made.add(step(1, 1.0), samples=1000, tokens=20_000)
    made.pause(60.0)
    clock.now += 62
    assert made.parts() == [
        "finetune 1/2",
        "loss 1.0000",
        "learning rate 2e-05",
        "500 samples/s",
        "10,000 tokens/s",
        "1:02 left",
    ]


def test_memory_is_what_the_process_has_taken_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.torch.cuda, "is_available", lambda: False)
    taken = progress.peak_memory()
    assert taken is not None
    assert 10 * 2**20 < taken < 2**40


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (723, "12:03"), (3723, "1:02:03"), (90_000, "1 day 01:00")],
)
def test_times_are_written_as_one_reads_them(seconds: float, text: str) -> None:
    assert describe_seconds(seconds) == text


def test_an_evaluation_has_a_line_with_all_its_numbers() -> None:
    line = describe_evaluation("finetune", {"step": 20, "eval_loss": 1.25, "eval_loss/ocr": 2.0, "eval_pope": 0.5}, 3.2)
    assert line == "finetune 20: evaluation  loss 1.2500  loss/ocr 2.0000  pope 0.5000  in 3 s"


def test_lines_go_into_the_folder_and_where_there_is_no_terminal_into_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(_KilledError):
        trainer(tmp_path, 3, _KilledAt(5)).train()
    trainer(tmp_path, 3).train(resume_from_checkpoint=str(tmp_path / "tiny" / "checkpoint-4"))

    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  tiny ", line) for line in lines)
    told = [line[21:] for line in lines]
    expected = ["tiny begins", "tiny 3/10", "tiny goes on behind step 4", "tiny 6/10", "tiny 9/10", "tiny 10/10"]
    assert [line.partition("  ")[0] for line in told] == expected
    assert [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()] == [
        line for line in told if "tokens/s" in line
    ]
    assert len(SAMPLES) == 10
