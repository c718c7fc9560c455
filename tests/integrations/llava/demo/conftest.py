"""A tiny random backbone and language model with a recipe, so that the demo runs in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file over models with random weights; its mmfuser taps layers 1, 2 and 3."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from integrations.llava.synthetic.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        projection_dim=32,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "backbone")
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(folder / "backbone")
    tokenizer = build_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(text).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    stage = {"batch_size": 2, "max_steps": 2, "log_every": 1}
    recipe = {
        "model": {
            "family": "transformers",
            "backbone": str(folder / "backbone"),
            "layers": [1, 2, 3],
            "fuser": "mmfuser",
            "llm": str(folder / "llm"),
        },
        "pretrain": {**stage, "trainable": ["fuser", "projector"], "template": "plain"},
        "finetune": {**stage, "trainable": ["fuser", "projector", "llm"], "template": "v1"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
