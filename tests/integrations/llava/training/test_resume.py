"""Runs that survive: stopped on request, killed while saving, out of disk space; and folders that are used again."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava.cli import train as train_command
from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import dump_recipe
from integrations.llava.training import resume as checkpointing
from integrations.llava.training.resume import load_state, own_part, save_state
from integrations.llava.training.run_folder import RunFolder
from integrations.llava.training.signals import EXIT_REQUEUE, RunInterrupted
from integrations.llava.training.stage import Stage
from integrations.llava.training.train import train
from layerfuse.errors import InputError
from layerfuse.files import check_disk_space

Usage = namedtuple("Usage", "total used free")


class StopAt(TrainerCallback):
    """Sends this process a signal in the middle of a step of a stage."""

    def __init__(self, stage: str, step: int, number: int = signal.SIGTERM) -> None:
        self.stage, self.step, self.number = stage, step, number

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


class _Fail(StopAt):
    """Raises instead."""

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step + 1 == self.step:
            raise RuntimeError("power cut")


def rows(folder: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"], row["loss"]) for row in lines if "loss" in row]


def both_stages(recipe: Recipe, **changes: Any) -> Recipe:
    stages = {name: dataclasses.replace(recipe.stage(name), **changes) for name in ("pretrain", "finetune")}
    return dataclasses.replace(recipe, **stages)


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_stopped_twice_ends_with_the_same_bits(
    number: int, accumulated: bool, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = both_stages(tiny_recipe, max_steps=5, micro_batch_size=2 if accumulated else 4)
    whole = train(recipe, tmp_path / "whole")
    for stage, step in (("pretrain", 2), ("finetune", 4)):
        with pytest.raises(RunInterrupted, match=f"stage {stage} stopped on request at step {step} of 5"):
            train(recipe, tmp_path / "stopped", callbacks=[StopAt(stage, step, number)])
        assert [path.name for path in (tmp_path / "stopped" / stage).iterdir()] == [f"checkpoint-{step}"]
    stopped = train(recipe, tmp_path / "stopped")

    assert rows(stopped) == rows(whole)
    weights, expected = load_file(stopped / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert RunFolder(stopped).finished == ("pretrain", "finetune")
    assert not list(stopped.glob("*/checkpoint-*"))


def test_a_run_that_died_goes_on_from_its_newest_checkpoint(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = both_stages(tiny_recipe, max_steps=5, save_every=2, log_every=3)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, tmp_path / "died", callbacks=[_Fail("finetune", 5)])
    assert [path.name for path in (tmp_path / "died" / "finetune").iterdir()] == ["checkpoint-4"]

    assert rows(train(recipe, tmp_path / "died")) == rows(whole)


def test_the_newest_checkpoints_are_kept_and_hold_what_is_trained(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = both_stages(tiny_recipe, max_steps=5, save_every=1, keep_checkpoints=2)
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, tmp_path / "run", callbacks=[_Fail("pretrain", 5)])
    folder = tmp_path / "run" / "pretrain"

    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    for name in ("trained", "optimizer-exp_avg", "optimizer-exp_avg_sq"):
        keys = load_file(folder / "checkpoint-4" / f"{name}.safetensors").keys()
        assert keys and all(key.startswith(("model.fuser.", "model.multi_modal_projector.")) for key in keys)


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = both_stages(tiny_recipe, max_steps=4, save_every=2)
    saved = checkpointing.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "optimizer" in path.name and (tmp_path / "run" / "pretrain" / "checkpoint-2").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(tensors, path)

    monkeypatch.setattr(checkpointing, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "pretrain").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert rows(train(recipe, tmp_path / "run")) == rows(train(recipe, tmp_path / "whole"))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_before_the_old_one_goes(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, str]] = []

    def noted(module: Any, name: str, path: Callable[[Any], str]) -> None:
        plain = getattr(module, name)

        def called(first: Any, *others: Any, **options: Any) -> Any:
            happened.append((name, path(first)))
            return plain(first, *others, **options)

        monkeypatch.setattr(module, name, called)

    def inode(descriptor: int) -> str:
        return str(os.fstat(descriptor).st_ino)

    noted(os, "fsync", inode)
    noted(os, "replace", lambda path: Path(path).name)
    noted(shutil, "rmtree", lambda path: Path(path).name)
    stage = tmp_path / "run" / "pretrain"
    with pytest.raises(RuntimeError, match="power cut"):
        train(both_stages(tiny_recipe, max_steps=3, save_every=1), tmp_path / "run", callbacks=[_Fail("pretrain", 3)])
    monkeypatch.undo()
    renamed = [place for place, event in enumerate(happened) if event == ("replace", ".saving")][-1]
    files = {str(path.stat().st_ino) for path in (stage / "checkpoint-2").iterdir()}
    assert files <= {inode for name, inode in happened[:renamed] if name == "fsync"}
    gone = happened.index(("rmtree", "checkpoint-1"), renamed)
    assert ("fsync", str(stage.stat().st_ino)) in happened[renamed:gone]


def test_each_process_reads_its_own_part_of_a_sharded_tensor() -> None:
    store = torch.distributed.HashStore()
    for rank, expected in enumerate([slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5)]):
        torch.distributed.init_process_group("fake", rank=rank, world_size=4, store=store)
        mesh = init_device_mesh("cpu", (4,))
        length = expected.stop - expected.start
        value = DTensor.from_local(
            torch.zeros(2, length), mesh, [Shard(1)], run_check=False, shape=torch.Size((2, 5)), stride=(5, 1)
        )
        assert own_part(value) == (slice(0, 2), expected)
        torch.distributed.destroy_process_group()


def test_a_full_disk_is_reported_before_anything_is_removed(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    with pytest.raises(OSError, match=r"stage pretrain with its checkpoints needs 0.00 GiB, but the disk"):
        train(tiny_recipe, tmp_path / "run")
    monkeypatch.undo()

    recipe = both_stages(tiny_recipe, max_steps=4, save_every=1)
    calls: list[str] = []

    def fills_up(_: Path) -> Usage:
        calls.append("")
        return Usage(100, 90, 10 if len(calls) > 2 else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", fills_up)
    with pytest.raises(OSError, match=r"checkpoint checkpoint-2 needs .* Nothing was removed; make room"):
        train(recipe, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other" / "pretrain").iterdir()] == ["checkpoint-1"]


def test_room_is_looked_for_where_a_folder_will_be_made(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "a" / "b", 1, "a checkpoint")
    with pytest.raises(OSError, match="a checkpoint needs"):
        check_disk_space(tmp_path / "a" / "b", 2**70, "a checkpoint")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.AdamW(first.parameters())
    save_state(first, optimizer, tmp_path)

    with pytest.raises(ValueError, match=r"trained.safetensors came from another model .*unexpected: bias"):
        load_state(second, torch.optim.AdamW(second.parameters()), tmp_path)


def test_a_damaged_checkpoint_is_named_with_the_way_out(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = both_stages(tiny_recipe, max_steps=2, save_every=1)
    with pytest.raises(RuntimeError):
        train(recipe, tmp_path, callbacks=[_Fail("pretrain", 2)])
    (checkpoint,) = (tmp_path / "pretrain").glob("checkpoint-*")
    half = (checkpoint / "rng_state.pth").read_bytes()[:1000]
    # In reverse of the order in which they are read.
    for name, content in (
        ("rng_state.pth", half),
        ("scheduler.pt", b""),
        ("scheduler.pt", b"no tensors"),
        ("trained.safetensors", half),
    ):
        (checkpoint / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{Path(name).stem}.* is damaged .*Remove the folder .*checkpoint-1"):
            train(recipe, tmp_path)


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_states_come_back_as_they_were(fused: bool, tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), fused=fused)

    model, optimizer = made()
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    save_state(model, optimizer, tmp_path)
    again, fresh = made()
    load_state(again, fresh, tmp_path)

    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert fresh.state[ours].keys() == optimizer.state[theirs].keys()
        for kind, value in optimizer.state[theirs].items():
            assert torch.equal(fresh.state[ours][kind], value)


def test_stages_can_be_run_one_by_one_in_a_folder(tiny_recipe: Recipe, tmp_path: Path) -> None:
    for stage in ("pretrain", "finetune"):
        train(tiny_recipe, tmp_path / "apart", stages=[stage])
    train(tiny_recipe, tmp_path / "at_once")

    assert rows(tmp_path / "apart") == rows(tmp_path / "at_once")


def test_a_folder_with_another_or_a_finished_run_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = train(tiny_recipe, tmp_path / "run", stages=["pretrain"])
    with pytest.raises(ValueError, match=r"already holds a finished run of this recipe \(pretrain\)"):
        train(tiny_recipe, folder, stages=["pretrain"])
    other = dataclasses.replace(tiny_recipe.pretrain, learning_rate=0.5)
    with pytest.raises(
        ValueError, match=r"another recipe, which differs in pretrain.learning_rate \(.* then, 0.5 now\)"
    ) as refused:
        train(dataclasses.replace(tiny_recipe, pretrain=other), folder)
    assert "overwrite" not in str(refused.value)


def test_what_only_changes_a_run_s_speed_may_change_when_it_goes_on(tiny_recipe: Recipe, tmp_path: Path) -> None:
    train(tiny_recipe, tmp_path / "run", stages=["pretrain"])
    changed = dataclasses.replace(tiny_recipe.finetune, num_workers=1, engine="zero2")

    train(dataclasses.replace(tiny_recipe, finetune=changed), tmp_path / "run")
    assert RunFolder(tmp_path / "run").finished == ("pretrain", "finetune")


def test_a_run_that_died_while_its_model_was_saved_makes_no_further_step(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = both_stages(tiny_recipe, max_steps=4, save_every=2)

    def dies(*_: Any, **__: Any) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(Stage, "save", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, tmp_path / "run")
    monkeypatch.undo()
    train(recipe, tmp_path / "run")

    assert [step for stage, step, _ in rows(tmp_path / "run") if stage == "pretrain"] == [1, 2, 3, 4]


def test_a_stop_while_a_stage_is_saved_starts_no_other(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Stage.save

    def stopped_meanwhile(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments, **options)

    monkeypatch.setattr(Stage, "save", stopped_meanwhile)
    with pytest.raises(RunInterrupted, match="stopped on request before stage finetune"):
        train(tiny_recipe, tmp_path / "run")
    assert RunFolder(tmp_path / "run").finished == ("pretrain",)


def test_a_copy_of_a_checkpoint_is_left_alone(tiny_recipe: Recipe, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "pretrain" / "checkpoint-2-good"
    copy.mkdir(parents=True)
    train(both_stages(tiny_recipe, max_steps=4, save_every=1), tmp_path / "run", stages=["pretrain"])

    assert copy.is_dir()


def test_data_that_have_changed_are_noticed(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = both_stages(tiny_recipe, max_steps=4)
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", callbacks=[StopAt("pretrain", 2)])
    data = Path(recipe.pretrain.data.path)
    whole = data.read_text()
    try:
        data.write_text(json.dumps(json.loads(whole)[1:]))
        with pytest.raises(ValueError, match="began with 8 usable samples, now there are 7"):
            train(recipe, tmp_path / "run")
    finally:
        data.write_text(whole)


def test_a_stop_that_reaches_every_process_leaves_the_loaders_to_the_step(
    tiny_recipe: Recipe, root: Path, tmp_path: Path
) -> None:
    """A scheduler's signal goes to the whole group: to the processes that load data, too."""
    recipe = both_stages(tiny_recipe, max_steps=2000, log_every=1, num_workers=1)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    arguments = ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "integrations.llava", *arguments],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "run" / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)

    assert process.returncode == EXIT_REQUEUE, output
    assert RunFolder(tmp_path / "run").checkpoint("pretrain") is not None


def test_the_command_line_returns_a_code_to_requeue_on(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(both_stages(tiny_recipe, max_steps=500, log_every=1)))
    folder = tmp_path / "run"

    def stop_soon() -> None:
        while not (folder / "metrics.jsonl").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_soon)
    watcher.start()
    code = train_command.main(["--recipe", str(tmp_path / "recipe.yaml"), "--output", str(folder)])
    watcher.join()

    assert code == EXIT_REQUEUE == 75
    assert RunFolder(folder).checkpoint("pretrain") is not None


def test_what_a_run_leaves_can_be_read_by_whoever_may_read_new_files(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    for name in ("model.safetensors", "config.json", "pretrain/adapter.safetensors"):
        assert (run_folder / name).stat().st_mode == (tmp_path / "new").stat().st_mode
