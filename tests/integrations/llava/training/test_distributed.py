"""Two processes (gloo, CPU) train as one does: DDP and FSDP2, text-only batches, stopped and resumed runs.

Each run is made when a test first asks for it (`distributed_worker`), so one that fails fails its own tests alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import dump_recipe, load_recipe
from integrations.llava.training.run_folder import RunFolder
from integrations.llava.training.signals import EXIT_REQUEUE
from integrations.llava.training.train import train
from tests.integrations.llava.training.process_pairs import Nursery

ENGINES = ("ddp", "fsdp2")
STEPS = 6


def losses(folder: Path) -> list[float]:
    """Losses of finetune, in order; every step has to be there once."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "finetune" and "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def launch(root: Path, *arguments: str) -> str:
    """Run two processes as torchrun does; they have to end well."""
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    done = subprocess.run(
        [sys.executable, *launcher, "--rdzv-endpoint", "localhost:0", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def finetuned(recipe: Recipe, **changes: object) -> Recipe:
    return dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Finetune on images and text-only samples: 12 samples, 3 steps an epoch, two epochs."""
    pretrain = dataclasses.replace(tiny_recipe.pretrain, micro_batch_size=2)
    return finetuned(
        dataclasses.replace(tiny_recipe, pretrain=pretrain),
        batch_size=4,
        micro_batch_size=2,
        max_steps=STEPS,
        log_every=1,
        engine="ddp",
    )


class Runs:
    """Folders of runs by name, each trained when it is first asked for.

    `single`, `mixed` (not grouped) and `accumulated` are trained in one process; `ddp` and the like, `ddp_mixed`,
    `ddp_accumulated`, `ddp_resumed` (stopped at step 3, and gone on) and `ddp_left` (stopped) in two.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "mixed": {"group_by_modality": False},
        "accumulated": {"micro_batch_size": 1},
        "bf16": {"precision": "bf16"},
        "compiled": {"compile": True},
        "packed": {"padding_free": True, "group_by_modality": False},
    }

    def __init__(self, recipe: Recipe, folder: Path, nursery: Nursery) -> None:
        self.recipe, self.folder, self.nursery = recipe, folder, nursery
        self.made: set[str] = set()
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        train(recipe, folder / "before", stages=["pretrain"])
        shutil.copy(folder / "before" / "pretrain" / "adapter.safetensors", folder)

    @property
    def adapter(self) -> Path:
        """Where finetunes start from."""
        return self.folder / "adapter.safetensors"

    def __truediv__(self, name: str) -> Path:
        if name not in self.made:
            self.made.add(name)
            self._make(name)
        return self.folder / name

    def _make(self, name: str) -> None:
        engine, _, variant = name.partition("_")
        if name == "both":
            train(self.recipe, self.folder / name)
        elif name in ("single", *self.VARIANTS):
            changed = finetuned(self.recipe, **self.VARIANTS.get(name, {}))
            train(changed, self.folder / name, stages=["finetune"], adapter=self.adapter)
        elif name == "fsdp2_then_ddp":
            self._in_two("both_engines")
        else:
            changes = {f"finetune.{key}": value for key, value in self.VARIANTS.get(variant, {}).items()}
            stop_at = 3 if variant in ("resumed", "left") else None
            self._in_two("run", name, engine, stop_at, variant != "left", changes)

    def _in_two(self, function: str, *arguments: Any) -> None:
        ended = self.nursery.run(f"distributed_worker:{function}", str(self.folder), *arguments)
        assert [each.code for each in ended] == [0, 0], "\n".join(f"{each}" for each in ended)


@pytest.fixture(scope="module")
def runs(recipe: Recipe, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(recipe, tmp_path_factory.mktemp("runs"), nursery)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_give_the_losses_and_weights_of_one(engine: str, runs: Runs) -> None:
    torch.testing.assert_close(losses(runs / engine), losses(runs / "single"), atol=2e-6, rtol=0)
    ours, single = (load_file(runs / name / "model.safetensors") for name in (engine, "single"))
    assert ours.keys() == single.keys()
    for name, tensor in single.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_two_processes_that_share_a_model_go_on_from_one_as_one_process_does(runs: Runs) -> None:
    """What is saved is built of the model's files again, and gets what was trained in parts."""
    start = {"model.checkpoint": str(runs / "single")}
    runs._in_two("run", "fsdp2_from", "fsdp2", None, True, start)
    recipe = load_recipe(runs.folder / "recipe.yaml", start)
    one = train(recipe, runs.folder / "single_from", adapter=runs.adapter)

    torch.testing.assert_close(losses(runs.folder / "fsdp2_from"), losses(one), atol=2e-6, rtol=0)
    two, alone = (load_file(folder / "model.safetensors") for folder in (runs.folder / "fsdp2_from", one))
    assert two.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_without_images_waits_for_none(engine: str, runs: Runs, data_folder: Path) -> None:
    """Not grouped, a step gives one process images and the other one none, and some steps give neither any."""
    assert any("image" not in sample for sample in json.loads((data_folder / "train.json").read_text()))
    torch.testing.assert_close(losses(runs / f"{engine}_mixed"), losses(runs / "mixed"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_several_micro_batches_are_summed_in_every_process(engine: str, runs: Runs) -> None:
    torch.testing.assert_close(losses(runs / f"{engine}_accumulated"), losses(runs / "accumulated"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_compiled_parts_give_the_losses_of_plain_ones(engine: str, runs: Runs) -> None:
    torch.testing.assert_close(losses(runs / f"{engine}_compiled"), losses(runs / "single"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_without_padding_give_the_losses_of_padded_ones(engine: str, runs: Runs) -> None:
    torch.testing.assert_close(losses(runs / f"{engine}_packed"), losses(runs / "mixed"), atol=1e-5, rtol=0)


def test_fsdp2_in_bf16_sums_gradients_in_float32(runs: Runs) -> None:
    """The worker looks at the policy; DDP sums in float32."""
    torch.testing.assert_close(losses(runs / "fsdp2_bf16"), losses(runs / "ddp_bf16"), atol=2e-2, rtol=0)


def test_an_engine_leaves_nothing_to_the_stage_after_it(runs: Runs) -> None:
    torch.testing.assert_close(losses(runs / "fsdp2_then_ddp"), losses(runs / "both"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_goes_on_with_the_same_bits(engine: str, runs: Runs) -> None:
    stopped = (runs / f"{engine}_resumed").with_suffix(".stopped").read_text()

    assert "stage finetune stopped on request at step 3 of 6" in stopped
    assert losses(runs / f"{engine}_resumed") == losses(runs / engine)
    resumed, whole = (load_file(runs / name / "model.safetensors") for name in (f"{engine}_resumed", engine))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_two_processes_goes_on_in_one(engine: str, runs: Runs, recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs / f"{engine}_left", folder)
    assert [path.name for path in (folder / "finetune").iterdir()] == ["checkpoint-3"]
    train(recipe, folder, stages=["finetune"], adapter=runs.adapter)

    assert losses(folder)[:3] == losses(runs / engine)[:3]
    torch.testing.assert_close(losses(folder), losses(runs / "single"), atol=2e-6, rtol=0)
    assert RunFolder(folder).finished == ("finetune",)


@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed, an extra that compiles code when first used"
)
def test_deepspeed_gives_the_losses_and_weights_of_one_process(
    runs: Runs,
) -> None:
    engines = ("zero2", "zero3")
    single = load_file(runs / "single" / "model.safetensors")
    for engine in engines:
        torch.testing.assert_close(losses(runs / engine), losses(runs / "single"), atol=2e-6, rtol=0)
        torch.testing.assert_close(losses(runs / f"{engine}_mixed"), losses(runs / "mixed"), atol=2e-6, rtol=0)
        assert losses(runs / f"{engine}_resumed") == losses(runs / engine)
        torch.testing.assert_close(load_file(runs / engine / "model.safetensors"), single, atol=1e-4, rtol=0)


def test_a_run_killed_in_mid_epoch_and_started_again_has_the_losses_of_one_that_was_left_alone(
    recipe: Recipe, runs: Runs, nursery: Nursery, root: Path, tmp_path: Path
) -> None:
    """Two processes that know their ranks: SIGTERM to one, then the same command again, now from torchrun."""
    samples = json.loads(Path(recipe.finetune.data.path).read_text()) * 20
    (tmp_path / "data.json").write_text(json.dumps(samples))
    data = dataclasses.replace(recipe.finetune.data, path=str(tmp_path / "data.json"))
    long = finetuned(recipe, data=data, max_steps=40)
    assert len(samples) > 40 * long.finetune.batch_size, "the whole run lies within one epoch"
    (tmp_path / "recipe.yaml").write_text(dump_recipe(long))
    command = ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--stages", "finetune"]
    command += ["--adapter", str(runs.adapter)]
    killed, alone = ([*command, "--output", str(tmp_path / name)] for name in ("killed", "alone"))
    # One is enough: the other hears of it.
    ended = nursery.run("distributed_worker:command_killed", killed, str(tmp_path / "killed" / "metrics.jsonl"))
    first = losses(tmp_path / "killed")
    assert [each.code for each in ended] == [EXIT_REQUEUE] * 2, ended
    assert 4 < len(first) < 40

    launch(root, "-m", "integrations.llava", *killed)
    ended = nursery.run("distributed_worker:command", alone)
    assert [each.code for each in ended] == [0, 0], ended
    assert losses(tmp_path / "killed") == losses(tmp_path / "alone")
    assert losses(tmp_path / "killed")[: len(first)] == first
    ours, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "alone"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
