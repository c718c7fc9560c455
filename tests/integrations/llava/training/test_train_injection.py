"""Layer injection from a recipe: what a trained model holds; with adapters; in two processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integrations.llava.checkpoints.connector import load_connector
from integrations.llava.checkpoints.convert import convert, convert_connector
from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.config import InjectionConfig, LoraConfig, Recipe, dump_recipe, load_recipe
from integrations.llava.dry_run import dry_run, render
from integrations.llava.modeling import assemble
from integrations.llava.training.train import train
from tests.integrations.llava.training.process_pairs import Nursery
from tests.integrations.llava.training.test_distributed import ENGINES, Runs, finetuned, losses
from tests.integrations.llava.training.trained_models import TrainedModels

INJECTION = InjectionConfig(pairs=((1, 0), (-1, 1)), when="before")


def injected(recipe: Recipe, injection: InjectionConfig = INJECTION) -> Recipe:
    """The tiny recipe; layer -1 is the fifth, which its fuser does not read."""
    model = dataclasses.replace(recipe.model, injection=injection)
    stages = {
        name: dataclasses.replace(recipe.stage(name), learning_rate=1e-2, warmup_ratio=0.0)
        for name in ("pretrain", "finetune")
    }
    return dataclasses.replace(recipe, model=model, **stages)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["injection-concat", "injection-mmfuser", "injection-attention_pool"])
def test_a_trained_model_says_what_is_injected_and_its_mergers_learned(name: str, trained: TrainedModels) -> None:
    folder = trained[name]
    model = load_model(folder)
    # A quarter of the tokens, in both.
    shuffled = name == "injection-attention_pool"

    assert model.model.vision_tower.backbone.layers == (1, 2, 3, 4, 5)
    assert model.config.injection == {
        "pairs": [[1, 0], [5, 1]],
        "merger": "pixel_shuffle_mlp" if shuffled else "mlp",
        "merger_options": {"window": 2} if shuffled else {},
        "when": "before",
    }
    stage_1 = load_file(folder / "pretrain" / "adapter.safetensors")
    for index in range(2):
        name = f"model.injection.mergers.{index}.linear_2.weight"
        assert stage_1[name].any(), "mergers learn in the first stage"
        assert not torch.equal(stage_1[name], model.state_dict()[name]), "and go on in the second"


def test_a_recipe_holds_its_injection(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = injected(tiny_recipe, injection=InjectionConfig(((1, 3, 0),), "mmfuser", {"num_heads": 4}, "before"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))

    assert load_recipe(tmp_path / "recipe.yaml").model == recipe.model
    given = {"model.injection.pairs": [[9, 0], [17, 1]], "model.injection.merger": "mlp"}
    assert load_recipe("mmfuser_7b", given).model.injection.pairs == ((9, 0), (17, 1))
    assert load_recipe("mmfuser_7b").model.injection == InjectionConfig()
    with pytest.raises(ValueError, match=r"model\.injection: pairs has \[9\]; give \[layer of the backbone"):
        load_recipe("mmfuser_7b", {"model.injection.pairs": [9, 0]})
    with pytest.raises(ValueError, match=r"model\.injection\.when is 'behind'; give one of: before, after"):
        load_recipe("mmfuser_7b", {"model.injection.when": "behind"})


def test_new_mergers_leave_everything_else_as_it_is_drawn(tiny_recipe: Recipe) -> None:
    """So that runs that differ in nothing but the injection start from the same weights."""
    plain, model = (
        assemble(recipe.model, recipe.pretrain, seed=3).model.state_dict()
        for recipe in (tiny_recipe, injected(tiny_recipe))
    )
    for name in plain:
        assert torch.equal(plain[name], model[name]), name


def test_adapters_of_the_language_model_learn_beside_mergers(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = injected(tiny_recipe)
    lora = LoraConfig(rank=4, target_modules=("q_proj", "down_proj"))
    recipe = dataclasses.replace(
        recipe, finetune=dataclasses.replace(recipe.finetune, lora=lora, gradient_checkpointing=True, precision="bf16")
    )
    folder = train(recipe, tmp_path / "run")
    before = load_file(folder / "pretrain" / "adapter.safetensors")
    after = load_file(folder / "finetune" / "adapter.safetensors")

    assert before.keys() == after.keys()
    assert not torch.equal(
        before["model.injection.mergers.0.linear_1.weight"], after["model.injection.mergers.0.linear_1.weight"]
    )
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    load_connector(load_model(folder), ("fuser", "projector"), folder / "finetune" / "adapter.safetensors")


def test_only_our_own_layout_holds_a_model_with_injection(trained: TrainedModels, tmp_path: Path) -> None:
    folder = trained["injection-mmfuser"]
    connector = convert_connector(folder, tmp_path / "connector")
    assert load_file(connector).keys() == load_file(folder / "finetune" / "adapter.safetensors").keys()
    with pytest.raises(ValueError, match="mergers of layer injection, which the published code does not know"):
        convert_connector(folder / "finetune" / "adapter.safetensors", tmp_path / "theirs", "mmfuser")
    convert(folder, tmp_path / "copy")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "copy" / "model.safetensors")[name], tensor)
    for layout in ("llava-hf", "mmfuser"):
        with pytest.raises(ValueError, match=rf"injection.*layout '{layout}' has no place"):
            convert(folder, tmp_path / layout, layout)


def test_a_dry_run_shows_what_is_injected(tiny_recipe: Recipe) -> None:
    report = render(dry_run(injected(tiny_recipe)))

    assert "injection" in report
    assert "mlp: layers 1 -> 0, -1 -> 1, before these decoder layers" in report
    assert "4 maps of" in report


@pytest.fixture(scope="module")
def runs(tiny_recipe: Recipe, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    recipe = injected(tiny_recipe)
    recipe = dataclasses.replace(recipe, pretrain=dataclasses.replace(recipe.pretrain, micro_batch_size=2))
    recipe = finetuned(
        recipe,
        batch_size=4,
        micro_batch_size=2,
        max_steps=6,
        log_every=1,
        learning_rate=2e-5,
        gradient_checkpointing=True,
    )
    return Runs(recipe, tmp_path_factory.mktemp("injected"), nursery)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_give_the_losses_of_one(engine: str, runs: Runs) -> None:
    """Text-only batches included; blocks taken apart by FSDP2 are those that injection is added around."""
    torch.testing.assert_close(losses(runs / engine), losses(runs / "single"), atol=2e-6, rtol=0)
    ours, single = (load_file(runs / name / "model.safetensors") for name in (engine, "single"))
    assert ours.keys() == single.keys()
    assert any(name.startswith("model.injection.") for name in ours)
    for name, tensor in single.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=0, msg=name)
