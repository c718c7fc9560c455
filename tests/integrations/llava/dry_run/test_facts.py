"""The model on the meta device: sizes that are known, configs that are found or missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from integrations.llava.config.schema import PARTS
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.dry_run.facts import build_on_meta, model_facts
from integrations.llava.modeling import RecipeParts
from integrations.llava.modeling.build import assemble
from tests.integrations.llava.dry_run.estimate_support import small_recipe

# Parameters of CLIP-L up to block 23, of Vicuna-7B and -13B with one more row for the image token, of LoRA at rank 128.
BACKBONE, VICUNA_7B, VICUNA_13B, ADAPTERS = 290_909_184, 6_738_423_808, 13_015_874_560, 319_815_680
SIZES = {
    "llava15_7b": (BACKBONE, 0, 20_979_712, VICUNA_7B),
    "llava15_13b": (BACKBONE, 0, 31_467_520, VICUNA_13B),
    "mmfuser_7b": (BACKBONE, 5_190_592, 20_979_712, VICUNA_7B),
    "mmfuser_13b": (BACKBONE, 5_190_592, 31_467_520, VICUNA_13B),
    "average_7b": (BACKBONE, 0, 20_979_712, VICUNA_7B),
    "scalar_mix_7b": (BACKBONE, 6, 20_979_712, VICUNA_7B),
    "concat_7b": (BACKBONE, 0, 37_756_928, VICUNA_7B),
    "mmfuser_eva02_7b": (291_041_560, 5_190_592, 20_979_712, VICUNA_7B),
    "mmfuser_siglip_7b": (397_745_440, 6_429_120, 21_504_000, VICUNA_7B),
    "mmfuser_7b_lora": (BACKBONE, 5_190_592, 20_979_712, VICUNA_7B + ADAPTERS),
    "mmfuser_7b_qlora": (BACKBONE, 5_190_592, 20_979_712, VICUNA_7B + ADAPTERS),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_models_have_the_known_numbers_of_parameters(name: str) -> None:
    recipe = load_recipe(name)
    parts = RecipeParts(recipe.model, offline=True)
    model = build_on_meta(parts, recipe.finetune)
    facts = model_facts(model)

    assert tuple(facts.trained[part] + facts.frozen[part] for part in PARTS) == SIZES[name]
    assert facts.trained["llm"] == (ADAPTERS if "lora" in name else SIZES[name][3])
    assert facts.trained["backbone"] == facts.frozen["fuser"] == facts.frozen["projector"] == 0
    assert facts.tokens_per_image == (729 if "siglip" in name else 576)
    assert parts.described_by == "config: the recipe's llm_architecture"
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}


@pytest.mark.parametrize("name", ["mmfuser_7b", "mmfuser_7b_lora"])
def test_sizes_are_those_of_the_model_that_is_trained(name: str, llm_folder: Path) -> None:
    recipe = small_recipe(name, llm_folder)
    for config in (recipe.pretrain, recipe.finetune):
        trained = assemble(recipe.model, config).model
        facts = model_facts(build_on_meta(RecipeParts(recipe.model, offline=True), config))
        assert facts.num_trained == sum(p.numel() for p in trained.parameters() if p.requires_grad)
        assert facts.num_frozen == sum(p.numel() for p in trained.parameters() if not p.requires_grad)


def test_config_and_tokenizer_come_from_a_folder_where_there_is_one(llm_folder: Path) -> None:
    recipe = load_recipe("mmfuser_7b", {"model.llm": str(llm_folder)})
    parts = RecipeParts(recipe.model, offline=True)
    model = build_on_meta(parts, recipe.finetune)

    assert parts.described_by == "its own config"
    assert model.config.text_config.hidden_size == 32
    assert model.config.text_config.vocab_size == model.config.image_token_index + 1


def test_without_tokenizer_the_image_token_comes_behind_the_vocabulary(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    recipe = load_recipe("mmfuser_7b", {"model.llm": str(tmp_path)})
    model = build_on_meta(RecipeParts(recipe.model, offline=True), recipe.finetune)

    assert model.config.image_token_index == 32_000
    assert model.lm_head.out_features == 32_001


def test_a_language_model_that_nothing_describes_is_refused() -> None:
    recipe = load_recipe("mmfuser_7b", {"model.llm": "no/such-model", "model.llm_architecture.model_type": "llama"})
    assert RecipeParts(recipe.model, offline=True).described_by.endswith("llm_architecture")

    nothing = load_recipe("tiny", {"model.llm": "no/such-model"})
    with pytest.raises(ValueError, match="nor in the hub's cache. So model.llm_architecture has to describe"):
        build_on_meta(RecipeParts(nothing.model, offline=True), nothing.pretrain)


def test_blocks_unlike_llamas_are_refused() -> None:
    architecture = {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    recipe = load_recipe("tiny", {"model.llm_pretrained": False, "model.llm_architecture": architecture})
    model = build_on_meta(RecipeParts(recipe.model, offline=True), recipe.pretrain)

    with pytest.raises(ValueError, match="blocks like Llama's .* but opt has no list 'layers'"):
        model_facts(model)


def test_a_backbone_that_learns_keeps_its_activations(llm_folder: Path) -> None:
    recipe = small_recipe("mmfuser_7b", llm_folder)
    learning = small_recipe("mmfuser_7b", llm_folder, {"pretrain.trainable": ["backbone", "fuser", "projector"]})
    frozen_bytes, learning_bytes = (
        model_facts(build_on_meta(RecipeParts(each.model, offline=True), each.pretrain)).connector_bytes
        for each in (recipe, learning)
    )

    assert learning_bytes > 2 * frozen_bytes
