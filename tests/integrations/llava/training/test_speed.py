"""What makes training faster changes no loss: compiled parts, the fused optimizer; runs that go on with another one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integrations.llava.config.schema import Recipe
from integrations.llava.modeling import compilation
from integrations.llava.training import stage as stage_module
from integrations.llava.training.engines import check_engine
from integrations.llava.training.signals import RunInterrupted
from integrations.llava.training.train import train
from layerfuse.errors import InputError
from tests.integrations.llava.training.test_resume import StopAt, both_stages, rows


def steps(folder: Path) -> list[float]:
    """Losses of all steps, in order."""
    return [loss for _, _, loss in rows(folder)]


def finetuned(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, **changes))


def test_compiled_parts_give_the_losses_of_plain_ones_also_after_a_stop(
    tiny_recipe: Recipe, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches with and without images; text-only ones show the backbone a single one."""
    monkeypatch.setattr(compilation, "_BACKEND", "aot_eager")
    recipe = both_stages(tiny_recipe, compile=True)
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", callbacks=[StopAt("finetune", 2)])
    # What changes speed alone may change when a run goes on.
    left = shutil.copytree(tmp_path / "run", tmp_path / "plain")
    compiled, plain = train(recipe, tmp_path / "run"), train(both_stages(tiny_recipe), left)

    torch.testing.assert_close(steps(compiled), steps(run_folder), atol=1e-5, rtol=0)
    torch.testing.assert_close(steps(plain), steps(run_folder), atol=1e-5, rtol=0)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (compiled, run_folder))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_torchs_own_compiler_gives_the_losses_of_plain_parts(
    tiny_recipe: Recipe, run_folder: Path, tmp_path: Path
) -> None:
    compiled = train(both_stages(tiny_recipe, compile=True), tmp_path / "run")
    torch.testing.assert_close(steps(compiled), steps(run_folder), atol=1e-5, rtol=0)


def test_a_missing_compiler_is_said_at_the_start(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise FileNotFoundError("g++ is nowhere")

    monkeypatch.setattr(compilation, "_BACKEND", missing)
    message = r"stage finetune: compile needs a compiler, .* for cpu here \(.*g\+\+ is nowhere.*; install it"
    with pytest.raises(InputError, match=message):
        train(finetuned(tiny_recipe, compile=True), tmp_path / "run")


def test_an_engine_that_takes_parts_apart_inside_is_refused_with_compiled_ones() -> None:
    with pytest.raises(
        InputError, match="engine 'zero3' takes parameters apart inside backbone and fuser.*use 'fsdp2'"
    ):
        check_engine("zero3", num_processes=2, cpu=False, compiled=True)
    check_engine("zero3", num_processes=1, cpu=True, compiled=True)


def test_the_fused_optimizer_makes_the_same_steps_and_goes_on_from_checkpoints_of_the_plain_one(
    tiny_recipe: Recipe, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []
    arguments = stage_module.training_arguments

    def plain_arguments(*given: Any) -> Any:
        return dataclasses.replace(arguments(*given), optim="adamw_torch")

    class Noted(StopAt):
        def on_train_begin(self, *_: Any, optimizer: Any, **others: Any) -> None:
            made.append(optimizer)

    with monkeypatch.context() as plain:
        plain.setattr(stage_module, "training_arguments", plain_arguments)
        with pytest.raises(RunInterrupted):
            train(tiny_recipe, tmp_path / "run", callbacks=[Noted("finetune", 2)])
    train(tiny_recipe, tmp_path / "run", callbacks=[Noted("finetune", 9)])

    assert [optimizer.param_groups[0].get("fused") for optimizer in made] == [None, None, True]
    torch.testing.assert_close(steps(tmp_path / "run"), steps(run_folder), atol=1e-6, rtol=0)
