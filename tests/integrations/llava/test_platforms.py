"""Where a system is not Linux: processes are spawned and not forked, and calls of POSIX are missing."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.llava.cli.data import main as data_main
from integrations.llava.config.schema import Recipe
from integrations.llava.training.train import train


@pytest.fixture
def spawned() -> Iterator[None]:
    """Processes start as on macOS and Windows: everything that they are given has to be copied."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_data_are_checked_by_processes_that_are_spawned(
    spawned: None, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = json.loads((data_folder / "pretrain.json").read_text())
    many = [sample | {"id": str(number)} for number, sample in enumerate(samples * (510 // len(samples) + 1))]
    (tmp_path / "many.json").write_text(json.dumps(many))
    given = ["--data", str(tmp_path / "many.json"), "--image-folder", str(data_folder), "--workers", "2"]

    assert data_main(["check", *given]) == 0
    assert f"{len(many)} samples" in capsys.readouterr().out


@pytest.mark.slow
def test_training_loads_samples_in_a_process_that_is_spawned(
    spawned: None, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    stage = dataclasses.replace(tiny_recipe.pretrain, num_workers=1, max_steps=1)
    recipe = dataclasses.replace(tiny_recipe, pretrain=stage)

    assert (train(recipe, tmp_path / "run", stages=["pretrain"]) / "model.safetensors").is_file()


def test_the_doctor_needs_no_call_that_only_linux_has(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sched_getaffinity", "fork", "geteuid", "getuid"):
        monkeypatch.delattr(os, name, raising=False)
    code = data_main(["check", "--data", str(data_folder / "pretrain.json"), "--image-folder", str(data_folder)])

    assert code == 0 and "nothing found" in capsys.readouterr().out
