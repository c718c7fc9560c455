"""Learning rates by block, and what transformers has names for: optimizers, schedules, arguments of its Trainer."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from integrations.llava.config.schema import Recipe
from integrations.llava.training import train
from integrations.llava.training.named_settings import check_optimizer_name, check_scheduler, check_trainer_options
from integrations.llava.training.optimizer import check_optimizer, parameter_groups, state_bytes_each
from integrations.llava.training.signals import RunInterrupted
from layerfuse.backbones import BackboneGroup, TransformersBackbone
from layerfuse.errors import InputError
from tests.integrations.llava.tiny_parts import tiny_clip
from tests.integrations.llava.training.test_resume import StopAt, rows
from tests.integrations.llava.training.test_run_starts import changed

CPU = torch.device("cpu")
eight_bits_on_cpu = pytest.mark.skipif(
    Version(metadata.version("bitsandbytes")) < Version("0.50"), reason="bitsandbytes before 0.50 has it on GPUs only"
)


def arguments(**given: Any) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **given)


class _Model(nn.Module):
    """A fuser, and backbones that were cut behind blocks 3 and 2."""

    def __init__(self) -> None:
        super().__init__()
        backbones = [TransformersBackbone(tiny_clip(), layers=[1, 3]), TransformersBackbone(tiny_clip(), layers=[2])]
        tower = nn.ModuleDict({"backbone": BackboneGroup(backbones, resample=None)})
        self.model = nn.ModuleDict({"vision_tower": tower, "fuser": nn.Linear(2, 2)})


def rate_of(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr"] for group in groups for name in group["names"]}


def test_layer_decay_lowers_the_rate_of_each_block_by_those_behind_it() -> None:
    rates = {"backbone": 1e-2}
    groups = parameter_groups(_Model(), learning_rate=1.0, learning_rates=rates, layer_decay=0.5, weight_decay=0.1)
    found = rate_of(groups)

    assert len(found) == len(list(_Model().named_parameters()))
    for name, rate in found.items():
        if "fuser" in name:
            assert rate == 1.0
        else:
            deepest = (3, 2)[".backbones.1." in name]
            block = int(name.partition(".layers.")[2].partition(".")[0]) + 1 if ".layers." in name else 0
            assert rate == 1e-2 * 0.5 ** (deepest - block), name
    # A group has one rate and one decay; without a rate of its own, the last block learns as all others do.
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups)
    plain = rate_of(parameter_groups(_Model(), learning_rate=1.0, layer_decay=0.5, weight_decay=0.1))
    assert set(plain.values()) == {1.0, 0.5, 0.25, 0.125}


def test_layer_decay_of_one_makes_the_groups_of_before() -> None:
    groups = parameter_groups(_Model(), learning_rate=1.0, learning_rates={"backbone": 0.1}, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1.0, 0.1),
        (1.0, 0.0),
        (0.1, 0.1),
        (0.1, 0.0),
    ]


def test_blocks_of_a_backbone_are_those_up_to_its_deepest_tapped_layer() -> None:
    backbone = TransformersBackbone(tiny_clip(), layers=[1, 3])
    assert [type(block).__name__ for block in backbone.blocks] == ["CLIPEncoderLayer"] * 3


def test_layer_decay_needs_a_backbone_that_learns(tiny_recipe: Recipe) -> None:
    with pytest.raises(InputError, match="layer_decay=0.9 is of a backbone that learns, and 'backbone' is not among"):
        changed(tiny_recipe, "finetune", layer_decay=0.9)
    for wrong in (0.0, 1.1):
        with pytest.raises(InputError, match="layer_decay"):
            changed(tiny_recipe, "finetune", layer_decay=wrong, trainable=("backbone", "fuser"))


@pytest.mark.parametrize(
    ("name", "options", "each"),
    [
        ("adamw_torch", {}, 8),
        ("sgd", {"momentum": 0.9}, 4),
        ("adafactor", {}, 0.125),
        pytest.param("adamw_8bit", {}, 2.5, marks=eight_bits_on_cpu),
    ],
)
def test_an_optimizer_of_transformers_goes_on_from_a_checkpoint_as_it_was(
    name: str, options: dict[str, Any], each: float, tiny_recipe: Recipe
) -> None:
    config = changed(tiny_recipe, "finetune", optimizer=name, optimizer_options=options).finetune
    check_optimizer(config, arguments(optim=name), CPU)
    assert state_bytes_each(config, arguments(optim=name), CPU) == each


class _Forgetful(torch.optim.SGD):
    """Its steps shrink by a count that is no state of a parameter, as in schedule-free optimizers."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                parameter.data -= group["lr"] / group["count"] * parameter.grad


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((_Forgetful, {}), "optimizer 'sgd' keeps something that a checkpoint does not hold"),
        ((torch.optim.SGD, {"params": []}), "optimizer 'sgd' makes groups of parameters of its own"),
        ((lambda: None, {}), "optimizer 'sgd' makes groups of parameters of its own"),
    ],
)
def test_an_optimizer_that_would_lose_something_is_refused(
    given: tuple[Any, Any], message: str, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(tiny_recipe, "finetune", optimizer="sgd").finetune
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args: given))
    with pytest.raises(InputError, match=message):
        check_optimizer(config, arguments(optim="sgd"), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer 'adamw' is unknown; did you mean .* adamw_torch_fused"),
        ({"scheduler": "cosin"}, "scheduler 'cosin' is unknown; did you mean 'cosine'"),
        ({"scheduler": "greedy"}, "scheduler 'greedy' is unknown"),
        ({"scheduler": "cosine_with_min_lr"}, r"'cosine_with_min_lr' cannot be made with scheduler_options=\{\}"),
        ({"scheduler_options": {"cycles": 2}}, "'cosine' cannot be made with .*cycles"),
        ({"scheduler": "constant", "scheduler_options": {"a": 1}}, "'constant' takes no scheduler_options"),
        ({"trainer_options": {"neftune_alpha": 5}}, "'neftune_alpha' is unknown; did you mean 'neftune_noise_alpha'"),
        ({"trainer_options": {"lr_scheduler_type": "cosine"}}, "by a key of its own: scheduler"),
        ({"trainer_options": {"seed": 1}}, "by a key of its own: seed"),
        ({"trainer_options": {"label_smoothing_factor": 0.1}}, "was never tried with; it takes neftune_noise_alpha"),
        ({"trainer_options": {"neftune_noise_alpha": "five"}}, "trainer_options.neftune_noise_alpha is 'five'"),
    ],
)
def test_names_that_transformers_or_this_trainer_does_not_know_are_refused(
    changes: dict[str, Any], message: str, tiny_recipe: Recipe
) -> None:
    with pytest.raises(InputError, match=message):
        for check in (check_scheduler, check_optimizer_name, check_trainer_options):
            check(changed(tiny_recipe, "finetune", **changes).finetune)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer_options": {"beta": 1}},
            r"stage finetune: optimizer 'adamw_torch_fused' cannot be used on cpu.*beta",
        ),
        ({"optimizer": "adamw_torch_xla"}, "stage finetune: optimizer 'adamw_torch_xla' cannot be used on cpu"),
        (
            {"trainer_options": {"dataloader_prefetch_factor": 2}},
            "stage finetune: transformers cannot train with these",
        ),
    ],
)
def test_settings_that_cannot_be_are_said_at_the_start(
    changes: dict[str, Any], message: str, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(changed(tiny_recipe, "finetune", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_whose_package_is_missing_is_named(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="stage pretrain: optimizer 'galore_adamw' needs a package that is not inst"):
        train(changed(tiny_recipe, "pretrain", optimizer="galore_adamw"), tmp_path / "run")


def test_an_engine_takes_no_optimizer_apart_that_was_not_tried(tiny_recipe: Recipe) -> None:
    config = changed(tiny_recipe, "finetune", optimizer="adafactor", engine="fsdp2").finetune
    with pytest.raises(
        InputError, match="'adafactor' has not been tried .* take one of adamw_torch, .* or engine 'ddp'"
    ):
        check_optimizer(config, arguments(optim="adafactor"), CPU, num_processes=2)
    check_optimizer(config, arguments(optim="adafactor"), CPU)


def finetuned(recipe: Recipe, folder: Path, stop_at: int | None = None) -> list[tuple[str, int, float]]:
    if stop_at is not None:
        with pytest.raises(RunInterrupted):
            train(recipe, folder, stages=["finetune"], adapter="random", callbacks=[StopAt("finetune", stop_at)])
    train(recipe, folder, stages=["finetune"], adapter="random")
    return rows(folder)


ADAFACTOR = {
    "optimizer": "adafactor",
    "scheduler": "polynomial",
    "scheduler_options": {"power": 2.0},
    "trainer_options": {"neftune_noise_alpha": 5},
}
EIGHT_BITS = {
    "optimizer": "adamw_8bit",
    "optimizer_options": {"betas": [0.9, 0.95]},
    "trainable": ("backbone", "fuser", "projector"),
    "learning_rates": {"backbone": 1e-3},
    "layer_decay": 0.8,
    "trainer_options": {"torch_empty_cache_steps": 1},
}


@pytest.mark.parametrize("settings", [ADAFACTOR, pytest.param(EIGHT_BITS, marks=eight_bits_on_cpu)])
def test_a_run_with_an_optimizer_and_options_of_transformers_goes_on_with_the_same_bits(
    settings: dict[str, Any], tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = changed(changed(tiny_recipe, "finetune", learning_rate=1e-2), "finetune", **settings)
    whole = finetuned(recipe, tmp_path / "whole")

    assert finetuned(recipe, tmp_path / "stopped", stop_at=2) == whole
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_neftune_adds_its_noise_in_training_alone(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = changed(tiny_recipe, "finetune", max_steps=1, learning_rate=0.0)
    noisy = changed(recipe, "finetune", trainer_options={"neftune_noise_alpha": 5})
    plain, other = (finetuned(each, tmp_path / name) for each, name in ((recipe, "plain"), (noisy, "noisy")))

    assert plain != other
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("noisy", "plain"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_schedule_s_options_reach_it(tiny_recipe: Recipe, tmp_path: Path) -> None:
    options = {"scheduler": "cosine_with_min_lr", "scheduler_options": {"min_lr_rate": 0.5}, "warmup_ratio": 0.0}
    recipe = changed(tiny_recipe, "pretrain", max_steps=3, learning_rate=1e-3, **options)
    folder = train(recipe, tmp_path / "run", stages=["pretrain"])

    found = [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found == pytest.approx([1e-3, 8.75e-4, 6.25e-4])
