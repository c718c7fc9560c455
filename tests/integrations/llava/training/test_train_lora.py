"""Finetuning through LoRA adapters, on whole and on quantised weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import LlamaConfig

from integrations.llava.checkpoints.lora import load_lora
from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.config.schema import LoraConfig, Recipe
from integrations.llava.modeling.build import assemble
from integrations.llava.modeling.lora import merge_lora
from integrations.llava.training.signals import RunInterrupted
from integrations.llava.training.train import train
from tests.integrations.llava.tiny_parts import save_llm
from tests.integrations.llava.training.test_resume import StopAt, rows

ADAPTERS = LoraConfig(rank=4, alpha=8, dropout=0.1, target_modules=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def wide_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose weights come in the blocks of 64 that 4-bit weights are stored in."""
    return save_llm(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


def with_adapters(recipe: Recipe, llm: Path, quantize: str = "none") -> Recipe:
    lora = dataclasses.replace(ADAPTERS, quantize=quantize)  # type: ignore[arg-type]
    finetune = dataclasses.replace(recipe.finetune, lora=lora, learning_rate=0.01, warmup_ratio=0.0)
    model = dataclasses.replace(recipe.model, llm=str(llm))
    return dataclasses.replace(recipe, finetune=finetune, model=model)


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_only_adapters_learn_and_the_model_that_is_saved_is_whole(
    quantize: str, tiny_recipe: Recipe, wide_llm: Path, tmp_path: Path
) -> None:
    folder = train(with_adapters(tiny_recipe, wide_llm, quantize), tmp_path / "run")
    before = load_file(wide_llm / "model.safetensors")
    after = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }

    assert not any("lora" in name for name in after)
    for name, tensor in before.items():
        same = torch.equal(after[name][: len(tensor)], tensor)
        assert same is not name.endswith(("q_proj.weight", "down_proj.weight")), name
    counts = json.loads((folder / "parameters.json").read_text())["finetune"]["llm"]
    assert counts["trainable"] == 2 * (4 * (64 + 64) + 4 * (128 + 64))


def test_adapters_on_the_base_give_the_model_that_was_saved(
    tiny_recipe: Recipe, wide_llm: Path, tmp_path: Path
) -> None:
    recipe = with_adapters(tiny_recipe, wide_llm)
    train(recipe, tmp_path / "run", stages=["pretrain"])
    base = load_model(tmp_path / "run")
    train(recipe, tmp_path / "run")
    adapters = tmp_path / "run" / "finetune" / "lora"
    load_lora(base, adapters)
    merge_lora(base)

    assert PeftConfig.from_pretrained(adapters).r == 4
    saved, merged = load_model(tmp_path / "run").state_dict(), base.state_dict()
    for name, tensor in saved.items():
        if "language_model" in name:
            torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)


def test_a_stopped_run_with_adapters_goes_on_with_the_same_bits(
    tiny_recipe: Recipe, wide_llm: Path, tmp_path: Path
) -> None:
    recipe = with_adapters(tiny_recipe, wide_llm, "nf4")
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "stopped", callbacks=[StopAt("finetune", 2)])
    names = load_file(tmp_path / "stopped" / "finetune" / "checkpoint-2" / "trained.safetensors")

    assert all(".lora_" in name or name.startswith(("model.fuser", "model.multi_modal")) for name in names)
    assert rows(train(recipe, tmp_path / "stopped")) == rows(whole)


def test_settings_that_contradict_each_other_are_refused(tiny_recipe: Recipe) -> None:
    for lora, trainable, message in (
        (LoraConfig(quantize="nf4"), ("llm",), "needs adapters to train; set lora.rank"),
        (LoraConfig(rank=4), ("projector",), "'llm' is not among the trainable parts"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(tiny_recipe.finetune, lora=lora, trainable=trainable)


def test_random_weights_cannot_be_quantised(tiny_recipe: Recipe, wide_llm: Path) -> None:
    recipe = with_adapters(tiny_recipe, wide_llm, "nf4")
    architecture = LlamaConfig.from_pretrained(wide_llm).to_dict()
    model = dataclasses.replace(recipe.model, llm_pretrained=False, llm_architecture=architecture)
    with pytest.raises(ValueError, match="quantised weights need a pretrained language model"):
        assemble(model, recipe.finetune)
