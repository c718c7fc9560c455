"""A tiny random backbone and language model with a recipe, so that the demo runs in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import CLIPImageProcessor

from tests.integrations.llava.tiny_parts import save_backbone, save_llm
from tools.make_demo_assets.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file over models with random weights; its mmfuser taps layers 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("tiny")
    backbone = save_backbone(folder / "backbone", num_hidden_layers=3, image_size=64)
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(backbone)
    llm = save_llm(folder / "llm", build_tokenizer(), num_hidden_layers=1, max_position_embeddings=512)
    stage = {"batch_size": 2, "max_steps": 2, "log_every": 1}
    recipe = {
        "model": {
            "family": "transformers",
            "backbone": str(backbone),
            "layers": [1, 2, 3],
            "fuser": "mmfuser",
            "llm": str(llm),
        },
        "pretrain": {**stage, "trainable": ["fuser", "projector"], "template": "plain"},
        "finetune": {**stage, "trainable": ["fuser", "projector", "llm"], "template": "v1"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
