"""What a start may do to a folder: go on, begin anew, replace what it was told to, or be refused; nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava.cli import train as train_command
from integrations.llava.config.schema import LoraConfig, Recipe
from integrations.llava.config.yaml_io import dump_recipe
from integrations.llava.training import RANDOM, train
from integrations.llava.training.run_folder import RunFolder
from integrations.llava.training.signals import RunInterrupted
from layerfuse.errors import InputError
from tests.integrations.llava.training.test_resume import StopAt, both_stages, rows

ADAPTER = "pretrain/adapter.safetensors"


def changed(recipe: Recipe, stage: str, **values: Any) -> Recipe:
    return dataclasses.replace(recipe, **{stage: dataclasses.replace(recipe.stage(stage), **values)})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class FailAtFirstStep(TrainerCallback):
    """Raises before the first step is made, as a model without room in memory does."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        raise MemoryError("too large")


@pytest.fixture(scope="module")
def finished(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages; nobody writes to it."""
    return train(tiny_recipe, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_overwriting_finetune_keeps_the_pretrain_it_starts_from(
    adapter: str | None, copied: Path, tiny_recipe: Recipe
) -> None:
    (copied / "finetune" / "notes.txt").write_text("mine")
    kept = {name: text for name, text in content(copied).items() if name.startswith(("pretrain", "logs/pretrain"))}
    recipe = changed(tiny_recipe, "finetune", learning_rate=0.01)
    given = None if adapter is None else copied / adapter
    train(recipe, copied, stages=["finetune"], overwrite=True, adapter=given)

    assert {name: content(copied)[name] for name in kept} == kept
    assert RunFolder(copied).finished == ("pretrain", "finetune")
    assert [(stage, step) for stage, step, _ in rows(copied)] == [
        (stage, step) for stage in ("pretrain", "finetune") for step in (1, 2, 3)
    ]
    assert (copied / "finetune" / "notes.txt").read_text() == "mine"


def test_overwriting_pretrain_alone_is_refused_while_a_finetune_stands_on_it(copied: Path, tiny_recipe: Recipe) -> None:
    before = content(copied)
    with pytest.raises(InputError, match="holds finetune, which comes after pretrain"):
        train(tiny_recipe, copied, stages=["pretrain"], overwrite=True)
    assert content(copied) == before


def test_overwriting_a_stage_cannot_change_what_the_kept_one_was_made_with(copied: Path, tiny_recipe: Recipe) -> None:
    model = dataclasses.replace(tiny_recipe.model, fuser="average", fuser_options={})
    with pytest.raises(InputError, match=r"differs in model.fuser \('mmfuser' then, 'average' now\)"):
        train(dataclasses.replace(tiny_recipe, model=model), copied, stages=["finetune"], overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_makes_no_step_removes_and_claims_nothing(
    overwrite: bool, copied: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    folder = copied if overwrite else tmp_path / "new"
    before = content(folder)
    with pytest.raises(MemoryError):
        train(tiny_recipe, folder, overwrite=overwrite, callbacks=[FailAtFirstStep()])

    assert content(folder) == before
    assert folder.exists() is overwrite
    if not overwrite:
        other = changed(tiny_recipe, "pretrain", batch_size=2, micro_batch_size=2)
        assert RunFolder(train(other, folder, stages=["pretrain"])).finished == ("pretrain",)


def test_an_adapter_that_overwriting_would_remove_is_refused(copied: Path, tiny_recipe: Recipe) -> None:
    with pytest.raises(InputError, match=r"is part of what --overwrite would remove; copy it elsewhere"):
        train(tiny_recipe, copied, overwrite=True, adapter=copied / ADAPTER)
    assert (copied / ADAPTER).is_file()


def test_stages_run_in_their_order_each_once(tiny_recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    """Data that are named for each belong to the stages as they were named."""
    data = [tiny_recipe.finetune.data.path, tiny_recipe.pretrain.data.path]
    stages = ["--stages", "finetune", "pretrain", "pretrain"]
    assert train_command.main(command(tiny_recipe, tmp_path, *stages, "--data", *data)) == 0
    folder = tmp_path / "run"

    assert rows(folder) == rows(finished)
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, finished))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_stage_is_not_run_behind_the_one_that_comes_after_it(
    tiny_recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    folder = train(tiny_recipe, tmp_path / "run", stages=["finetune"], adapter=finished / ADAPTER)
    model = (folder / "model.safetensors").read_bytes()
    for stages in (["pretrain"], ["pretrain", "finetune"]):
        with pytest.raises(InputError, match="holds finetune, which comes after pretrain"):
            train(tiny_recipe, folder, stages=stages)
    assert (folder / "model.safetensors").read_bytes() == model


def test_a_finetune_without_connector_is_refused_unless_asked_for(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no fuser and projector to start from.*--adapter random"):
        train(tiny_recipe, tmp_path / "run", stages=["finetune"])
    assert not (tmp_path / "run").exists()
    assert train(tiny_recipe, tmp_path / "run", stages=["finetune"], adapter=RANDOM).is_dir()


def test_a_stopped_finetune_goes_on_from_the_adapter_it_began_with(
    tiny_recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    """Also where the adapter is frozen, so that no checkpoint holds it, and the command does not name it again."""
    recipe = changed(tiny_recipe, "finetune", trainable=("llm",), max_steps=4)
    whole = train(recipe, tmp_path / "whole", stages=["finetune"], adapter=finished / ADAPTER)
    folder = tmp_path / "stopped"
    with pytest.raises(RunInterrupted):
        train(recipe, folder, stages=["finetune"], adapter=finished / ADAPTER, callbacks=[StopAt("finetune", 2)])
    with pytest.raises(InputError, match="began from .*adapter.safetensors, and now .* from random weights"):
        train(recipe, folder, stages=["finetune"], adapter=RANDOM)
    train(recipe, folder, stages=["finetune"])

    assert rows(folder) == rows(whole)
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_data_file_with_as_many_but_other_samples_is_noticed(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Same size, same time of change."""
    data = Path(tiny_recipe.pretrain.data.path)
    own = tmp_path / "data.json"
    own.write_bytes(data.read_bytes())
    recipe = changed(tiny_recipe, "pretrain", data=dataclasses.replace(tiny_recipe.pretrain.data, path=str(own)))
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", callbacks=[StopAt("pretrain", 2)])
    times = own.stat()
    own.write_text(own.read_text().replace("number 3 on", "number 4 on"))
    os.utime(own, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert own.stat().st_size == times.st_size
    with pytest.raises(InputError, match="began with other samples: there are 8 as before, but their text"):
        train(recipe, tmp_path / "run")
    # Written in another way, they are the same.
    own.write_text("[" + ",\n\n".join(map(json.dumps, json.loads(data.read_text()))) + "]\n")
    assert rows(train(recipe, tmp_path / "run", stages=["pretrain"]))[-1][1] == 3


HOLD = """
import sys, time
from integrations.llava.training.run_folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_training_s_alone_and_a_killed_one_leaves_no_harm(
    finished: Path, copied: Path, tiny_recipe: Recipe, root: Path
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(copied)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    who = f"process {holder.pid} on {socket.gethostname()}"
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"a training is running in .*: {who}, since .* give another folder"):
            train(tiny_recipe, copied, overwrite=overwrite)
    assert {**content(copied), ".running.json": None} == {**content(finished), ".running.json": None}
    holder.kill()
    holder.wait()
    holder.stdout.close()

    train(tiny_recipe, copied, overwrite=True)
    assert not [*copied.glob(".running*")]


def test_a_training_that_starts_as_another_ends_has_the_folder_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one takes the lock between the first one's last two lines; a third must not be let in."""
    (tmp_path / "recipe.yaml").touch()
    waiting, second = [RunFolder(tmp_path)], contextlib.ExitStack()

    class Queued(FileLock):  # type: ignore[misc]  # of a class of its own: filelock knows those of one class in a process
        def release(self, force: bool = False) -> None:
            super().release(force)
            while waiting:
                second.enter_context(waiting.pop().locked())

    with monkeypatch.context() as patch:
        patch.setattr("integrations.llava.training.run_folder.FileLock", Queued)
        with RunFolder(tmp_path).locked():
            pass
    with second, pytest.raises(InputError, match="a training is running"), RunFolder(tmp_path).locked():
        pass


def test_a_folder_that_cannot_be_made_is_said_with_the_way_out(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written to.*give another one \(--output\)"):
        train(tiny_recipe, tmp_path / "file" / "run")


def test_a_damaged_note_of_a_run_is_refused_by_name(copied: Path, tiny_recipe: Recipe) -> None:
    (copied / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json is damaged"):
        train(tiny_recipe, copied)


def test_a_start_says_what_it_goes_on_from_or_that_it_begins_anew(
    tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fail(TrainerCallback):
        def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise MemoryError

    caplog.set_level(logging.INFO, logger="integrations.llava")
    recipe = both_stages(tiny_recipe, max_steps=4, log_every=1)
    with pytest.raises(MemoryError):
        train(recipe, tmp_path / "run", callbacks=[Fail()])
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", callbacks=[StopAt("pretrain", 3)])
    train(recipe, tmp_path / "run", stages=["pretrain"])

    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("stage pretrain ")]
    assert said == [
        "stage pretrain begins",
        "stage pretrain begins anew at step 1: an earlier start reached step 2 and left no checkpoint (save_every)",
        "stage pretrain goes on from checkpoint-3",
    ]


def test_random_parts_that_are_frozen_are_the_same_in_both_stages_and_new_adapters_have_the_stage_s_seed(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    class Weights(TrainerCallback):
        def __init__(self) -> None:
            self.taken: list[dict[str, torch.Tensor]] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **_: Any) -> None:
            self.taken.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    architecture = {"model_type": "llama", "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48}
    architecture |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    model = dataclasses.replace(
        tiny_recipe.model, llm_pretrained=False, llm_architecture=architecture, tokenizer=tiny_recipe.model.llm
    )
    recipe = dataclasses.replace(both_stages(tiny_recipe, max_steps=1), model=model)
    seen = {}
    for seed in (1, 2):
        weights = Weights()
        train(
            changed(recipe, "finetune", seed=seed, lora=LoraConfig(rank=2)), tmp_path / str(seed), callbacks=[weights]
        )
        seen[seed] = weights.taken
        first, second = weights.taken
        frozen = [name for name in first if "language_model" in name]
        assert frozen and all(torch.equal(first[n], second.get(n, second.get(_based(n)))) for n in frozen)
    lora = [name for name in seen[1][1] if "lora_A" in name]
    assert lora and not any(torch.equal(seen[1][1][name], seen[2][1][name]) for name in lora)


def _based(name: str) -> str:
    """Name of a weight below an adapter."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.{kind}"


def command(recipe: Recipe, folder: Path, *arguments: str) -> list[str]:
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return ["--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "run"), *arguments]


def test_a_run_of_0_1_goes_on_with_the_path_that_it_noted_as_it_was_given(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = dataclasses.replace(
        tiny_recipe.pretrain, data=dataclasses.replace(tiny_recipe.pretrain.data, path="./data.json")
    )
    recipe = dataclasses.replace(tiny_recipe, pretrain=stage)
    (tmp_path / "run.json").write_text(json.dumps({"finished": ["pretrain"]}))
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe).replace(str(tmp_path.resolve() / "data.json"), "./data.json"))
    assert "./data.json" in file.read_text()

    assert RunFolder(tmp_path).open(recipe, ["pretrain", "finetune"]) == ("finetune",)
    other = dataclasses.replace(stage, data=dataclasses.replace(stage.data, path="./other.json"))
    with pytest.raises(InputError, match=r"pretrain\.data\.path \('\./data\.json' then"):
        RunFolder(tmp_path).open(dataclasses.replace(recipe, pretrain=other), ["pretrain", "finetune"])
