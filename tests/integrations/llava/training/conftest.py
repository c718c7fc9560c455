"""Images of many sizes, and models that are trained on them once for all files of this folder."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integrations.llava.training.trained_models import SIZES, TrainedModels, model_recipe


@pytest.fixture(scope="session")
def sized_folder(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of `data_folder`, with images of `SIZES`, and `questions.jsonl` about them."""
    made = tmp_path_factory.mktemp("sizes")
    random = np.random.default_rng(0)
    for index, size in enumerate(SIZES):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(made / f"{index}.png")
    for name in ("pretrain.json", "train.json"):
        shutil.copy(data_folder / name, made)
    rows = [
        {"question_id": index, "image": f"{index}.png", "text": "What number?", "kind": "number", "answer": index}
        for index in range(len(SIZES))
    ]
    (made / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="session")
def trained(
    backbone_folder: Path, llm_folder: Path, sized_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainedModels:
    """The models of `MODELS`."""
    recipe_of = partial(model_recipe, backbone=backbone_folder, llm=llm_folder, data=sized_folder)
    return TrainedModels(recipe_of, tmp_path_factory.mktemp("trained"))
