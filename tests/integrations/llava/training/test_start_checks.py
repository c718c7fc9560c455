"""What can be known at the start is said at the start, for every stage; and how the command line says it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.cli import train as train_command
from integrations.llava.config.schema import LoraConfig, Recipe
from integrations.llava.training.train import train
from layerfuse.errors import InputError, UserError
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
def test_what_cannot_be_built_is_said_before_data_are_read(
    what: str, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = UNBUILDABLE[what]
    monkeypatch.setattr("integrations.llava.training.stage.read_samples", None)
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
    monkeypatch.setattr("integrations.llava.training.stage.read_samples", None)
    if package == "bitsandbytes":
        monkeypatch.setattr("integrations.llava.modeling.quantization.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=message):
        train(changed(tiny_recipe, "finetune", lora=lora), tmp_path / "run")


def test_a_reporter_that_is_not_installed_is_said_before_data_are_read(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "integrations.llava.training.metrics_log.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    monkeypatch.setattr("integrations.llava.training.stage.read_samples", None)
    message = r"report_to names 'wandb', whose package is not installed; install it, or .* tensorboard, or to \[\]"
    with pytest.raises(ImportError, match=message):
        train(dataclasses.replace(tiny_recipe, report_to=("tensorboard", "wandb")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
