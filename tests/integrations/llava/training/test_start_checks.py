"""What can be known at the start is said at the start, for every stage; and how the command line says it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.cli import train as train_command
from integrations.llava.config.schema import LoraConfig, Recipe
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.training.signals import RunInterrupted
from integrations.llava.training.train import train
from layerfuse.errors import InputError, UserError
from tests.integrations.llava.tiny_parts import human_and_gpt
from tests.integrations.llava.training.test_resume import StopAt, rows
from tests.integrations.llava.training.test_run_starts import changed, command


def _with_lora(recipe: Recipe, **values: Any) -> Recipe:
    return changed(recipe, "finetune", lora=LoraConfig(rank=2, **values))


UNBUILDABLE: dict[str, tuple[Callable[[Recipe], Recipe], str]] = {
    "reporter": (
        lambda r: dataclasses.replace(r, report_to=("tensorbord",)),
        "report_to 'tensorbord' is unknown; did you mean 'tensorboard'.* wandb",
    ),
    "scheduler": (lambda r: changed(r, "finetune", scheduler="cosin"), "scheduler 'cosin' is unknown; did you mean 'c"),
    "scheduler with settings": (
        lambda r: changed(r, "finetune", scheduler="warmup_stable_decay"),
        r"'warmup_stable_decay' cannot be made with scheduler_options=\{\}",
    ),
    "plateau": (lambda r: changed(r, "finetune", scheduler="reduce_lr_on_plateau"), "scheduler 'reduce_lr_on_plat"),
    "LoRA targets": (lambda r: _with_lora(r, target_modules=("q_prj",)), "no linear layers called q_prj"),
    "nothing learns": (
        lambda r: changed(
            dataclasses.replace(r, model=dataclasses.replace(r.model, fuser="select", fuser_options={}, layers=(-2,))),
            "finetune",
            trainable=("fuser",),
        ),
        "nothing learns: trainable is \\['fuser'\\], and none of it has weights in this model .fuser 'select'",
    ),
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
def test_what_cannot_be_built_is_said_at_the_start(what: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    change, message = UNBUILDABLE[what]
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
def test_a_missing_package_is_said_at_the_start(
    package: str, lora: LoraConfig, message: str, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "bitsandbytes":
        monkeypatch.setattr("integrations.llava.modeling.quantization.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=message):
        train(changed(tiny_recipe, "finetune", lora=lora), tmp_path / "run")


def test_a_reporter_that_is_not_installed_is_said_at_the_start(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "integrations.llava.training.metrics_log.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    message = r"report_to names 'wandb', whose package is not installed; install it, or .* tensorboard, or to \[\]"
    with pytest.raises(ImportError, match=message):
        train(dataclasses.replace(tiny_recipe, report_to=("tensorboard", "wandb")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def with_data(recipe: Recipe, stage: str, **values: Any) -> Recipe:
    return changed(recipe, stage, data=dataclasses.replace(recipe.stage(stage).data, **values))


@pytest.fixture
def faulty(tiny_recipe: Recipe, tmp_path: Path) -> Recipe:
    """A recipe in which something of every kind is wrong."""
    bad = [
        {"id": "a", "image": "nowhere.png", "conversations": human_and_gpt("<image>\nWhat?", "This.")},
        {"id": "b", "conversations": []},
    ]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    recipe = changed(tiny_recipe, "pretrain", scheduler="cosin", optimizer="adam", trainer_options={"alpha": 1})
    recipe = with_data(recipe, "pretrain", image_folder=str(tmp_path / "imgs"))
    return with_data(_with_lora(recipe, target_modules=("q_prj",)), "finetune", path=str(tmp_path / "bad.json"))


def test_everything_that_is_wrong_is_told_in_one_message_sorted_by_stage(
    faulty: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError) as caught:
        train(faulty, tmp_path / "run", stages=["finetune", "pretrain"])
    lines = str(caught.value).splitlines()

    assert lines[0] == "6 problems, and no step was made; mend them, then start again:"
    starts = (
        "stage pretrain: scheduler 'cosin' is unknown",
        "stage pretrain: optimizer 'adam' is unknown",
        "stage pretrain: argument of TrainingArguments in trainer_options 'alpha' is unknown",
        f"stage pretrain: the image folder {tmp_path / 'imgs'} does not exist",
        "stage finetune: lora.target_modules: the language model has no linear layers called q_prj",
        "stage finetune: 2 problems in the data (1 image missing, 1 no conversation), images in",
        "  sample a: image nowhere.png: missing",
        "  sample b: has no 'conversations'",
    )
    for line, start in zip(lines[1:], starts, strict=True):
        assert line.startswith(f"  {start}"), (line, start)
    # What takes no time is told before the data are read.
    (told,) = (record.getMessage() for record in caplog.records if record.name.endswith("training.start"))
    assert "q_prj" in told and "imgs" not in told and "Ctrl-C" in told
    assert not (tmp_path / "run").exists()


def test_a_problem_of_both_stages_is_told_once(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(tiny_recipe, model=dataclasses.replace(tiny_recipe.model, fuser="mmfusr"))
    with pytest.raises(InputError, match="^stages pretrain and finetune: fuser 'mmfusr' is unknown"):
        train(recipe, tmp_path / "run")


def test_bad_samples_are_left_out_and_samples_drawn_by_options_of_the_command(
    tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = json.loads(Path(tiny_recipe.finetune.data.path).read_text())
    broken = [{**sample, "conversations": []} if index % 6 == 0 else sample for index, sample in enumerate(samples)]
    (tmp_path / "data.json").write_text(json.dumps(broken))
    recipe = with_data(tiny_recipe, "finetune", path=str(tmp_path / "data.json"))
    options = ["--stages", "finetune", "--adapter", "random", "--max-samples", "6"]
    assert train_command.main(command(recipe, tmp_path, *options)) == 2
    assert train_command.main(command(recipe, tmp_path, *options, "--bad-samples", "skip")) == 0

    assert json.loads((tmp_path / "run" / "run.json").read_text())["samples"] == {"finetune": 4}
    assert "2 of 6 samples are left out" in caplog.text
    resolved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (resolved.finetune.data.max_samples, resolved.finetune.data.bad_samples) == (6, "skip")
    assert resolved.pretrain.data == recipe.pretrain.data


def test_a_run_on_drawn_samples_goes_on_with_the_same_losses_and_is_not_gone_on_with_on_others(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = with_data(tiny_recipe, "pretrain", max_samples=5)
    whole = train(recipe, tmp_path / "whole", stages=["pretrain"])
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", stages=["pretrain"], callbacks=[StopAt("pretrain", 2)])
    with pytest.raises(InputError, match=r"differs in pretrain.data.max_samples \(5 then, None now\)"):
        train(tiny_recipe, tmp_path / "run", stages=["pretrain"])

    assert rows(train(recipe, tmp_path / "run", stages=["pretrain"])) == rows(whole)


def test_steps_between_log_entries_cannot_be_none(tiny_recipe: Recipe) -> None:
    with pytest.raises(InputError, match="log_every=0 is too small"):
        changed(tiny_recipe, "finetune", log_every=0)


def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = changed(tiny_recipe, "finetune", scheduler="cosin")
    assert train_command.main(command(recipe, tmp_path)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("python -m integrations.llava train: stage finetune: scheduler 'cosin' is unknown")
    assert "usage" not in said


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, RuntimeError])
def test_an_error_of_the_program_keeps_its_traceback(
    error: type[Exception], tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise error("deep inside")

    monkeypatch.setattr("integrations.llava.training.trainer.LlavaTrainer.compute_loss", breaks)
    with pytest.raises(error, match="deep inside"):
        train_command.main(command(tiny_recipe, tmp_path))
