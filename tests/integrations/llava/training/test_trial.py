"""A trial of the longest batch: what does not fit is said before the first step, and what fits trains as without it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integrations.llava.config import LoraConfig, Recipe, dump_recipe
from integrations.llava.training import train
from integrations.llava.training.signals import RunInterrupted
from layerfuse.errors import InputError
from tests.integrations.llava.training.memory_limits import limited
from tests.integrations.llava.training.process_pairs import Nursery
from tests.integrations.llava.training.test_resume import StopAt, rows
from tests.integrations.llava.training.test_run_starts import changed, content

EVERYTHING = 10**9


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Finetune on images and texts with a trial; not grouped, so that the longest sample is in any batch."""
    return changed(tiny_recipe, "finetune", trial=True, group_by_modality=False, log_every=1)


def finetune(recipe: Recipe, folder: Path, **options: Any) -> Path:
    return train(recipe, folder, stages=["finetune"], **{"adapter": "random", **options})


def longest(recipe: Recipe, folder: Path) -> int:
    """Positions of the longest batch that the trial looks at."""
    with limited(EVERYTHING) as seen:
        finetune(recipe, folder)
    assert seen[0] == max(seen, key=lambda shape: shape[0] * shape[1])
    return seen[0][1]


def test_the_start_names_the_micro_batch_that_fits_and_leaves_the_folder_as_it_was(
    recipe: Recipe, tmp_path: Path
) -> None:
    length = longest(recipe, tmp_path / "whole")
    for most, fits in ((length * 3, 2), (length * 2, 2), (length * 2 - 1, 1)):
        with limited(most), pytest.raises(InputError) as caught:
            finetune(recipe, tmp_path / "run")
        said = str(caught.value)
        assert f"(4 x {length} positions, " in said and "stage finetune does not fit into the memory of cpu" in said
        assert f"{fits} at a time fit: --finetune.micro_batch_size {fits} " in said
        assert not (tmp_path / "run").exists()
    with limited(length * 2) as seen:
        finetune(changed(recipe, "finetune", micro_batch_size=2), tmp_path / "run")
    assert max(rows * columns for rows, columns in seen) <= length * 2
    with (
        limited(length - 1),
        pytest.raises(InputError, match="not even one sample at a time fits; take --finetune"),
    ):
        finetune(recipe, tmp_path / "none")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_trial_that_fails_leaves_a_finished_run_byte_for_byte(
    overwrite: bool, recipe: Recipe, tmp_path: Path
) -> None:
    folder = finetune(recipe, tmp_path / "run") if overwrite else tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    before, listing = content(folder), sorted(folder.rglob("*"))
    faulty = changed(recipe, "finetune", scheduler="cosin")
    lost = dataclasses.replace(recipe.finetune.data, image_folder="nowhere")
    for each, message in (
        (recipe, "does not fit"),
        (faulty, "cosin"),
        (changed(recipe, "finetune", data=lost), "nowhe"),
    ):
        with limited(1), pytest.raises(InputError, match=message):
            finetune(each, folder, overwrite=overwrite)
        assert content(folder) == before and sorted(folder.rglob("*")) == listing


def test_losses_are_those_of_a_run_without_trial(recipe: Recipe, tmp_path: Path) -> None:
    """With dropout, and gradients that are summed up; also where a stopped run tries again."""
    lora = LoraConfig(rank=2, dropout=0.5, target_modules=("q_proj",))
    recipe = changed(recipe, "finetune", lora=lora, micro_batch_size=2)
    tried = finetune(recipe, tmp_path / "tried")
    plain = finetune(changed(recipe, "finetune", trial=False), tmp_path / "plain")
    with pytest.raises(RunInterrupted):
        finetune(recipe, tmp_path / "stopped", callbacks=[StopAt("finetune", 2)])

    assert rows(tried) == rows(plain) == rows(finetune(recipe, tmp_path / "stopped"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tried, plain))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_run_that_goes_on_is_told_what_may_still_change(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        finetune(recipe, tmp_path / "run", callbacks=[StopAt("finetune", 2)])
    with limited(1), pytest.raises(InputError, match="goes on with the micro batches it began with: take a larger"):
        finetune(recipe, tmp_path / "run")
    assert len(rows(finetune(recipe, tmp_path / "run"))) == 3


def test_memory_that_runs_out_later_is_told_with_step_and_samples(recipe: Recipe, tmp_path: Path) -> None:
    recipe = changed(recipe, "finetune", trial=False, save_every=1, micro_batch_size=2)
    whole = finetune(recipe, tmp_path / "whole")
    message = (
        r"step 2: memory ran out in micro batch 2 of 2, 2 x \d+ positions, samples (\w+), (\w+)\..*torch says: tried"
    )
    with limited(1, calls=3), pytest.raises(InputError, match=message) as caught:
        finetune(recipe, tmp_path / "run")
    assert "The rest is long" not in str(caught.value)
    assert len({*re.findall(r"samples (\w+), (\w+)\.", str(caught.value))[0]}) == 2
    assert [path.name for path in (tmp_path / "run" / "finetune").iterdir()] == ["checkpoint-1"]
    assert rows(finetune(recipe, tmp_path / "run")) == rows(whole)


def test_memory_that_runs_out_in_the_optimizer_s_step_is_told(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("integrations.llava.training.start.check_optimizer", lambda *_, **__: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(InputError, match="step 1: memory ran out outside of a micro batch.*says: nothing"):
        finetune(changed(recipe, "finetune", trial=False), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_processes_agree_on_what_fits_one_of_them(recipe: Recipe, tmp_path: Path, nursery: Nursery) -> None:
    length = longest(recipe, tmp_path / "whole")
    two = changed(recipe, "finetune", micro_batch_size=2)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(two))
    ended = nursery.run("trial_worker:main", str(tmp_path), "ddp", length)
    assert [each.code for each in ended] == [0, 0], ended
    for rank in (0, 1):
        assert "1 at a time fit: --finetune.micro_batch_size 1 " in (tmp_path / f"{rank}.txt").read_text()
    assert not (tmp_path / "run").exists()
