"""What a start may do to a folder: go on, begin anew, replace what it was told to, or be refused; nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava import train_command
from integrations.llava.config import LoraConfig, Recipe
from integrations.llava.interruption import RunInterrupted, StopRequest, stop_requests
from integrations.llava.recipe_files import dump_recipe
from integrations.llava.run_folder import RunFolder
from integrations.llava.train import RANDOM, train
from layerfuse.errors import InputError, UserError
from tests.integrations.llava.test_resume import StopAt, both_stages, rows

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
    assert train_command.main(_command(tiny_recipe, tmp_path, *stages, "--data", *data)) == 0
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


def _with_lora(recipe: Recipe, **values: Any) -> Recipe:
    return changed(recipe, "finetune", lora=LoraConfig(rank=2, **values))


UNBUILDABLE: dict[str, tuple[Callable[[Recipe], Recipe], str]] = {
    "scheduler": (lambda r: changed(r, "finetune", scheduler="cosin"), "scheduler 'cosin' is unknown; did you mean 'c"),
    "scheduler with settings": (
        lambda r: changed(r, "finetune", scheduler="warmup_stable_decay"),
        "'warmup_stable_decay' wants settings that a recipe does not have",
    ),
    "plateau": (lambda r: changed(r, "finetune", scheduler="reduce_lr_on_plateau"), "scheduler 'reduce_lr_on_plat"),
    "LoRA targets": (lambda r: _with_lora(r, target_modules=("q_prj",)), "no linear layers called q_prj"),
    "template": (lambda r: changed(r, "finetune", template="v2"), "template 'v2' is unknown"),
    "attention": (
        lambda r: dataclasses.replace(r, model=dataclasses.replace(r.model, attention="sdqa")),
        "see model.attention",
    ),
    "fuser": (
        lambda r: dataclasses.replace(r, model=dataclasses.replace(r.model, fuser="mmfusr")),
        "did you mean 'mmfuser'",
    ),
    "fuser options": (
        lambda r: dataclasses.replace(r, model=dataclasses.replace(r.model, fuser_options={"heads": 4})),
        "heads",
    ),
    "language model": (
        lambda r: dataclasses.replace(r, model=dataclasses.replace(r.model, llm="no/where")),
        "language model no/where cannot be built or loaded",
    ),
    "tokenizer": (
        lambda r: dataclasses.replace(r, model=dataclasses.replace(r.model, tokenizer="no/where")),
        "tokenizer of no/where cannot be built or loaded",
    ),
    "data": (
        lambda r: changed(r, "finetune", data=dataclasses.replace(r.finetune.data, path="")),
        "stage finetune: no data; give --finetune.data.path",
    ),
}


@pytest.mark.parametrize("what", UNBUILDABLE)
def test_what_cannot_be_built_is_said_before_data_are_read(
    what: str, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = UNBUILDABLE[what]
    monkeypatch.setattr("integrations.llava.train.read_samples", None)
    with pytest.raises(UserError, match=message):
        train(change(tiny_recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("package", "lora", "message"),
    [
        ("peft", LoraConfig(rank=2), "stage finetune: LoRA needs the package peft"),
        ("bitsandbytes", LoraConfig(rank=2, quantize="nf4"), "stage finetune: nf4 weights need the package bitsandb"),
    ],
)
def test_a_missing_package_is_said_before_data_are_read(
    package: str, lora: LoraConfig, message: str, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("integrations.llava.train.read_samples", None)
    if package == "bitsandbytes":
        monkeypatch.setattr("integrations.llava.quantization.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=message):
        train(changed(tiny_recipe, "finetune", lora=lora), tmp_path / "run")


def test_steps_between_log_entries_cannot_be_none(tiny_recipe: Recipe) -> None:
    with pytest.raises(InputError, match="log_every=0 is too small"):
        changed(tiny_recipe, "finetune", log_every=0)


HOLD = """
import sys, time
from integrations.llava.run_folder import RunFolder
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
    assert {name: text for name, text in content(copied).items() if name[0] != "."} == content(finished)
    holder.kill()
    holder.wait()
    holder.stdout.close()

    train(tiny_recipe, copied, overwrite=True)
    assert not [*copied.glob(".lock"), *copied.glob(".running*")]


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


def test_handlers_of_signals_are_put_back_whatever_happens() -> None:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        expected = [signal.getsignal(number) for number in numbers]
        with pytest.raises(MemoryError), stop_requests() as request:
            assert [signal.getsignal(number) for number in numbers] == [request] * 3
            raise MemoryError
        assert [signal.getsignal(number) for number in numbers] == expected
        with stop_requests():
            os.kill(os.getpid(), signal.SIGINT)
            # The next one is the system's own: it kills at once.
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_request_where_nothing_is_to_be_saved_ends_the_run_at_once() -> None:
    request = StopRequest()
    with pytest.raises(RunInterrupted, match="nothing had to be saved"), request.at_once():
        request(signal.SIGTERM, None)
    with pytest.raises(RunInterrupted) as stop, request.at_once():
        raise AssertionError("not reached")
    assert stop.value.exit_code == 75


def _long_run(recipe: Recipe, folder: Path, root: Path) -> subprocess.Popen[str]:
    (folder / "recipe.yaml").write_text(dump_recipe(both_stages(recipe, max_steps=2000, log_every=1, num_workers=1)))
    command = ["-m", "integrations.llava", "train", "--recipe", str(folder / "recipe.yaml")]
    process = subprocess.Popen(
        [sys.executable, *command, "--output", str(folder / "run")],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell has jobs in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (folder / "run" / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    return process


def test_the_first_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(
    tiny_recipe: Recipe, root: Path, tmp_path: Path
) -> None:
    """Sent to the whole group, loaders included, as a terminal does."""
    process = _long_run(tiny_recipe, tmp_path, root)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 130, output
    assert "start the same command again to go on" in output and "Traceback" not in output
    assert RunFolder(tmp_path / "run").checkpoint("pretrain") is not None


def test_a_second_ctrl_c_kills_at_once(tiny_recipe: Recipe, root: Path, tmp_path: Path) -> None:
    process = _long_run(tiny_recipe, tmp_path, root)
    process.send_signal(signal.SIGSTOP)  # so that both come within one step
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)

    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert not [*(tmp_path / "run").glob("*/.saving/trained.safetensors.part")]


def _command(recipe: Recipe, folder: Path, *arguments: str) -> list[str]:
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return ["--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "run"), *arguments]


def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = changed(tiny_recipe, "finetune", scheduler="cosin")
    assert train_command.main(_command(recipe, tmp_path)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("python -m integrations.llava train: stage finetune: scheduler 'cosin' is unknown")
    assert "usage" not in said


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, RuntimeError])
def test_an_error_of_the_program_keeps_its_traceback(
    error: type[Exception], tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise error("deep inside")

    monkeypatch.setattr("integrations.llava.trainer.LlavaTrainer.compute_loss", breaks)
    with pytest.raises(error, match="deep inside"):
        train_command.main(_command(tiny_recipe, tmp_path))
