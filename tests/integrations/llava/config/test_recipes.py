"""The recipes of the folder: each opens with what a reader asks first, shows only what differs, and trains."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from integrations.llava.cli.train import main
from integrations.llava.config.schema import STAGES
from integrations.llava.config.yaml_io import (
    RECIPE_FOLDER,
    dump_recipe,
    load_recipe,
    parse_overrides,
    recipe_names,
)
from integrations.llava.dry_run import GPUS, dry_run, render
from integrations.llava.training.train import train

DOCUMENT = Path(__file__).parents[4] / "docs" / "recipes.md"
# What each recipe sets, beside the recipe that it derives from.
DIFFERENCES = {
    "average_7b": ("mmfuser_7b", {"model.fuser"}),
    "concat_7b": ("mmfuser_7b", {"model.fuser"}),
    "llava15_13b": ("llava15_7b", {"model.llm", "model.llm_architecture"}),
    "llava15_7b": ("mmfuser_7b", {"model.fuser", "model.layers"}),
    "mmfuser_13b": ("mmfuser_7b", {"model.llm", "model.llm_architecture", "pretrain.learning_rates"}),
    "mmfuser_7b_lora": (
        "mmfuser_7b",
        {"finetune.learning_rate", "finetune.learning_rates", "finetune.lora", "finetune.engine"},
    ),
    "mmfuser_7b_qlora": ("mmfuser_7b_lora", {"finetune.lora"}),
    "mmfuser_eva02_7b": ("mmfuser_7b", {"model.backbone"}),
    "mmfuser_siglip_7b": ("mmfuser_7b", {"model.backbone", "model.layers"}),
    "scalar_mix_7b": ("mmfuser_7b", {"model.fuser"}),
}
WHOLE = ("mmfuser_7b", "tiny")


def test_the_folder_holds_the_recipes_we_know_of() -> None:
    assert recipe_names() == tuple(sorted([*DIFFERENCES, *WHOLE]))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_opens_with_command_hardware_hours_source_and_scores(name: str) -> None:
    header = (RECIPE_FOLDER / f"{name}.yaml").read_text().split("\n\n")[0]
    words = [
        "# ",
        f"-m integrations.llava train --recipe {name} ",
        "# Hardware: ",
        "# Hours: ",
        "# Source: ",
        "# Expected: ",
    ]
    places = [header.find(word) for word in words]

    assert -1 not in places and places == sorted(places)
    assert all(line.startswith("#") and len(line) <= 120 for line in header.splitlines())


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_variant_shows_only_what_differs_from_its_base(name: str) -> None:
    written = yaml.safe_load((RECIPE_FOLDER / f"{name}.yaml").read_text())
    base, keys = DIFFERENCES[name]

    assert written.pop("base") == f"{base}.yaml"
    assert {f"{section}.{key}" for section, values in written.items() for key in values} == keys
    recipe, other = load_recipe(name), load_recipe(base)
    for key in keys:
        section, _, item = key.partition(".")
        assert getattr(getattr(recipe, section), item) != getattr(getattr(other, section), item)


def test_published_numbers_of_mmfuser_7b() -> None:
    """scripts/mmfuser/{pretrain,finetune}_7b.sh of yuecao0119/MMFuser, on eight GPUs."""
    recipe = load_recipe("mmfuser_7b")

    assert recipe.model.layers == (-22, -17, -12, -7, -2)
    assert (recipe.pretrain.learning_rate, recipe.finetune.learning_rate) == (1e-3, 2e-5)
    assert (recipe.pretrain.batches(8), recipe.finetune.batches(8)) == ((32, 1), (16, 1))
    assert (recipe.pretrain.template, recipe.finetune.template) == ("plain", "v1")
    assert (recipe.pretrain.data.image_mode, recipe.finetune.data.image_mode) == ("crop", "pad")
    assert recipe.finetune.group_by_modality and not recipe.pretrain.group_by_modality
    assert recipe.pretrain.trainable == ("fuser", "projector")
    assert recipe.finetune.trainable == ("fuser", "projector", "llm")
    for stage in (recipe.pretrain, recipe.finetune):
        assert (stage.epochs, stage.warmup_ratio, stage.weight_decay, stage.scheduler) == (1, 0.03, 0, "cosine")
        assert (stage.precision, stage.gradient_checkpointing, stage.data.max_length) == ("bf16", True, 2048)
        assert (stage.learning_rates, stage.loss_average, stage.max_grad_norm) == ({}, "micro_batch", 1.0)


def test_the_fuser_of_13b_pretrains_at_a_tenth_of_the_rate() -> None:
    """--ms_cross_attn_lr of scripts/mmfuser/pretrain_13b.sh; the finetune and the baseline have no such rate."""
    recipe = load_recipe("mmfuser_13b")

    assert recipe.pretrain.learning_rates == {"fuser": 1e-4} and recipe.pretrain.learning_rate == 1e-3
    assert recipe.finetune.learning_rates == {} == load_recipe("llava15_13b").pretrain.learning_rates
    assert recipe.model.llm == load_recipe("llava15_13b").model.llm == "lmsys/vicuna-13b-v1.5"


def test_lora_has_the_published_settings() -> None:
    """scripts/v1_5/finetune_lora.sh of haotian-liu/LLaVA."""
    for name, quantize in (("mmfuser_7b_lora", "none"), ("mmfuser_7b_qlora", "nf4")):
        stage = load_recipe(name).finetune
        assert (stage.lora.rank, stage.lora.alpha, stage.lora.dropout) == (128, 256, 0.05)
        assert (stage.learning_rate, stage.learning_rates) == (2e-4, {"projector": 2e-5, "fuser": 2e-5})
        assert stage.lora.quantize == quantize and stage.engine == "ddp"
        assert load_recipe(name).pretrain.lora.rank == 0


def test_siglips_layers_are_spread_evenly_and_end_with_the_penultimate_one() -> None:
    layers = load_recipe("mmfuser_siglip_7b").model.layers

    assert {later - earlier for earlier, later in itertools.pairwise(layers)} == {6}
    assert layers[-1] == -2 and 27 + 1 + layers[0] == 2


def test_every_run_on_gpus_keeps_checkpoints() -> None:
    recipes = [load_recipe(name) for name in recipe_names() if name != "tiny"]

    assert all(recipe.stage(stage).save_every == 500 for recipe in recipes for stage in STAGES)
    assert {recipe.pretrain.engine for recipe in recipes} == {"ddp"}


def test_the_tiny_recipe_names_folders_of_the_package() -> None:
    recipe = load_recipe("tiny")
    for folder in (recipe.model.backbone, recipe.model.llm):
        assert Path(folder).is_dir()
    assert AutoTokenizer.from_pretrained(recipe.model.llm).eos_token is not None


def documented_command() -> list[str]:
    """The command of the document that makes only the sizes small."""
    block = next(block for block in code_blocks() if "model.llm_pretrained false" in block)
    prompt, python, module, *command = shlex.split(block.replace("\\\n", " "))
    assert (prompt, python, module) == ("$", "python", "-m")
    return command


def code_blocks() -> list[str]:
    return re.findall(r"^```\w+\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def places(data_folder: Path, llm_folder: Path, tmp_path: Path) -> dict[str, str]:
    """What stands where the documented command has its own names."""
    return {
        "pairs.json": str(data_folder / "pretrain.json"),
        "chats.json": str(data_folder / "train.json"),
        "images": str(data_folder),
        "integrations/llava/synthetic/assets/llm": str(llm_folder),
        "runs/small": str(tmp_path / "run"),
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_the_documented_command_trains_mmfuser_7b_with_only_its_sizes_made_small(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = documented_command()
    assert command[:4] == ["integrations.llava", "train", "--recipe", "mmfuser_7b"]
    assert set(places) <= set(command)

    assert main([places.get(word, word) for word in command[2:]]) == 0

    folder = Path(places["runs/small"])
    assert (folder / "model.safetensors").is_file() and f"run: {folder}" in capsys.readouterr().out
    ran = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe = yaml.safe_load(dump_recipe(load_recipe("mmfuser_7b")))
    changed = {
        f"{part}.{key}" for part in ("model", *STAGES) for key in ran[part] if ran[part][key] != recipe[part][key]
    }
    model = ("backbone_options", "backbone_pretrained", "image_size", "fuser_options")
    llm = ("llm_architecture", "llm_pretrained", "tokenizer")
    assert changed == {*(f"model.{key}" for key in (*model, *llm)), "pretrain.data", "finetune.data"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains_both_stages_with_its_sizes_made_small(
    name: str, places: dict[str, str], tmp_path: Path
) -> None:
    command = documented_command()
    sizes = [places.get(word, word) for word in command[command.index("--model.backbone_pretrained") :]]
    overrides = parse_overrides(sizes) if name != "tiny" else {}
    if not name.startswith("mmfuser"):
        overrides.pop("model.fuser_options.num_heads", None)
    for stage, file in (("pretrain", "pairs.json"), ("finetune", "chats.json")):
        overrides[f"{stage}.data.path"] = places[file]
        overrides[f"{stage}.data.image_folder"] = places["images"]
        overrides[f"{stage}.num_workers"] = 0
        overrides[f"{stage}.max_steps"] = 1
    # Four bits need weights to begin with; test_lora.py trains on some.
    overrides["finetune.lora.quantize"] = "none"

    folder = train(load_recipe(name, overrides), tmp_path / name)

    assert (folder / "model.safetensors").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 2


def test_the_document_lists_every_recipe_and_shows_a_dry_run_as_it_is() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)

    assert sorted(listed) == list(recipe_names())
    assert all(re.search(rf"\b{gpu}\b", text) for gpu in GPUS)
    assert render(dry_run(load_recipe("mmfuser_7b"), gpu="a100-80")) in code_blocks()
