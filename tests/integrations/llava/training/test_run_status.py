"""How runs stand: told from their folders alone, which stay as they are."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.cli.runs import main as runs_command
from integrations.llava.config.schema import Recipe
from integrations.llava.training.run_folder import RunFolder
from integrations.llava.training.run_status import RunStatus, find_runs
from integrations.llava.training.signals import RunInterrupted
from integrations.llava.training.train import train
from tests.integrations.llava.training.test_resume import StopAt, _Fail, both_stages


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(folder: Path) -> RunStatus:
    before = listing(folder)
    (status,) = find_runs(folder)
    assert listing(folder) == before
    return status


@pytest.fixture(scope="module")
def folder(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped, one that failed in its second stage, one that is finished; and one that never began."""
    made = tmp_path_factory.mktemp("runs")
    with pytest.raises(RunInterrupted):
        train(tiny_recipe, made / "stopped", callbacks=[StopAt("pretrain", 2)])
    with pytest.raises(RuntimeError, match="power cut"):
        each_step = both_stages(tiny_recipe, log_every=1)
        train(each_step, made / "study" / "failed", callbacks=[_Fail("finetune", 2)])
    train(tiny_recipe, made / "finished", stages=["pretrain"])
    (made / "notes").mkdir()
    return made


def test_runs_are_found_below_a_folder_with_their_state_and_reason(folder: Path) -> None:
    found = {run.folder.name: run for run in find_runs(folder)}
    assert {name: (run.state, run.stage, run.step, run.steps) for name, run in found.items()} == {
        "stopped": ("stopped", "pretrain", 2, 3),
        "failed": ("failed", "finetune", 1, 3),
        "finished": ("finished", "pretrain", 3, 3),
    }
    assert "stage pretrain stopped on request at step 2 of 3" in found["stopped"].reason
    assert (found["failed"].reason, found["finished"].reason) == ("power cut", "")
    losses = [json.loads(line)["loss"] for line in (folder / "finished" / "metrics.jsonl").read_text().splitlines()]
    assert found["finished"].loss == losses[-1]
    assert find_runs(folder / "nowhere") == []


def test_a_run_that_goes_on_and_ends_well_is_finished(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        train(tiny_recipe, tmp_path, stages=["pretrain"], callbacks=[StopAt("pretrain", 2)])
    train(tiny_recipe, tmp_path, stages=["pretrain"])
    assert (only(tmp_path).state, only(tmp_path).reason) == ("finished", "")


def test_a_run_in_a_folder_that_a_training_holds_is_running(folder: Path) -> None:
    with RunFolder(folder / "stopped").locked():
        run = next(run for run in find_runs(folder) if run.folder.name == "stopped")
        assert run.state == "running"
        assert f"process {os.getpid()} on " in run.reason


def _write(folder: Path, **noted: Any) -> Path:
    (folder / "run.json").write_text(json.dumps({"finished": [], "samples": {"pretrain": 8}} | noted))
    (folder / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 7, "loss": 1.5, "learning_rate": 0.1}\n')
    return folder


def test_a_run_whose_process_is_gone_without_a_word_has_failed(tmp_path: Path) -> None:
    _write(tmp_path, ended=None)
    (tmp_path / ".running.json").write_text('{"process": 1, "host": "elsewhere", "since": "long ago"}')
    (tmp_path / ".lock").touch()
    assert (only(tmp_path).state, only(tmp_path).step) == ("failed", 7)
    assert "ended without a word" in only(tmp_path).reason


def test_a_run_of_a_version_that_did_not_note_its_end_is_stopped(tmp_path: Path) -> None:
    run = only(_write(tmp_path))
    assert (run.state, run.reason, run.steps) == ("stopped", "", None)


def test_the_command_prints_a_table_and_the_reasons_below(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs_command([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "stage", "step", "loss", "evaluation", "age"]
    assert [line.split()[1] for line in lines[1:4]] == ["finished", "stopped", "failed"]
    assert "3 of 3" in lines[1]
    assert f"{folder / 'study' / 'failed'} failed: power cut" in lines


def test_the_command_shows_the_last_evaluation_and_the_age_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = _write(tmp_path, steps={"pretrain": 1200}, best={"pretrain": {"step": 7}}) / "metrics.jsonl"
    row = {"stage": "pretrain", "step": 7, "eval_loss": 1.25, "eval_pope": 0.5, "eval_mme": float("nan")}
    log.write_text(log.read_text() + json.dumps(row) + "\n")
    os.utime(log, (0, time.time() - 3 * 3600))
    assert runs_command([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == [
        *("stopped", "pretrain", "7", "of", "1,200", "1.5000", "1.2500", "3", "h")
    ]

    assert runs_command([str(tmp_path), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["evaluation"] == {"loss": 1.25, "pope": 0.5, "mme": None}  # JSON has no NaN
    assert (run["best_step"], run["folder"], run["state"]) == (7, str(tmp_path), "stopped")


def test_the_command_says_that_there_are_none_and_which_file_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs_command([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        runs_command([str(tmp_path)])
    assert "run.json is damaged" in capsys.readouterr().err
