"""Tiny random parts in the real formats: tokenizer, language model, backbone, images, LLaVA json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerBase

from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.data.images import read_image
from integrations.llava.inference.predictor import Predictor, load_predictor
from tests.integrations.llava.inference.answering_parts import save_run
from tests.integrations.llava.tiny_parts import (
    human_and_gpt,
    make_tokenizer,
    save_backbone,
    save_llm,
    tiny_overrides,
)
from tests.integrations.llava.training.process_pairs import Nursery


@pytest.fixture(scope="session", params=["llama", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Both kinds of tokenizers."""
    return make_tokenizer(request.param)


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as transformers saves them."""
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP vision model of 5 blocks on 32-pixel images: 16 patches."""
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images, `pretrain.json` with captions, `train.json` with conversations, some of them without image."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    pretrain: list[dict[str, Any]] = []
    train: list[dict[str, Any]] = []
    for index in range(8):
        pixels = random.integers(0, 255, (24 + 2 * index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        image = {"id": f"i{index}", "image": f"{index}.png"}
        pretrain.append(image | {"conversations": human_and_gpt("<image>\nDescribe.", f"number {index} on a wall")})
        turns = human_and_gpt("<image>\nWhat number is it?", f"It is {index}.", "Sure?", "Yes." * (1 + index % 3))
        train.append(image | {"conversations": turns})
    train += [{"id": f"t{i}", "conversations": human_and_gpt("What is one?", f"A number, {i}.")} for i in range(4)]
    (folder / "pretrain.json").write_text(json.dumps(pretrain))
    (folder / "train.json").write_text(json.dumps(train))
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(backbone_folder: Path, llm_folder: Path, data_folder: Path) -> Recipe:
    """MMFuser's recipe at a size that trains in a second."""
    overrides = tiny_overrides(backbone_folder, llm_folder, data_folder) | {
        "model.layers": [1, 2, 3, 4],
        "model.fuser_options": {"num_heads": 4},
        "pretrain.gradient_checkpointing": False,
        "finetune.gradient_checkpointing": False,
    }
    return load_recipe("mmfuser_7b", overrides)


@pytest.fixture(scope="session")
def run_folder(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages, three steps each."""
    from integrations.llava.training.train import train

    return train(tiny_recipe, tmp_path_factory.mktemp("run") / "mmfuser")


@pytest.fixture(scope="session")
def nursery(root: Path) -> Iterator[Nursery]:
    """Starts two processes at a time that have imported everything already."""
    made = Nursery(root)
    yield made
    made.close()


@pytest.fixture(scope="session")
def run(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `tiny` with a model that was never trained, yet answers; nobody writes to it."""
    return save_run(tmp_path_factory.mktemp("run") / "tiny", backbone_folder)


@pytest.fixture(scope="session")
def predictor(run: Path) -> Predictor:
    """The model of `run`, loaded; who changes one loads their own."""
    return load_predictor(run)


@pytest.fixture(scope="session")
def pictures(data_folder: Path) -> list[Image.Image]:
    """The images of `data_folder`, `0.png` first."""
    return [read_image(data_folder / f"{index}.png") for index in range(8)]


@pytest.fixture(scope="session")
def mixture(pictures: list[Image.Image]) -> list[Any]:
    """Images for `PROMPTS`: one, several, none."""
    return [pictures[0], None, pictures[1:3], pictures[3], None, pictures[4:7], pictures[7], None]
