"""Each fuser alone, and layer injection, AnyRes and two backbones with some of them: trained, saved, answered.

Both stages of a recipe, one step and two; what is special to a kind stands in the files of that kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integrations.llava.checkpoints import load_model
from integrations.llava.inference.predictor import load_predictor
from layerfuse import list_fusers
from tests.integrations.llava.training.trained_models import MODELS, TrainedModels, answers


def test_every_fuser_is_among_the_models() -> None:
    assert set(list_fusers()) <= MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_trained_saved_loaded_and_answered_the_same_at_batch_1_and_8(
    name: str, trained: TrainedModels, sized_folder: Path
) -> None:
    run = trained[name]
    predictor = load_predictor(run)
    model = predictor.model

    assert model.dtype == torch.float32
    assert model.model.fuser.name == MODELS[name]["fuser"]
    stages = [load_file(run / stage / "adapter.safetensors") for stage in ("pretrain", "finetune")]
    assert stages[0].keys() == stages[1].keys()
    # What is added to every key of an attention alike changes nothing: only rounding moves it.
    learning = [key for key in stages[0] if not key.endswith("k_proj.bias")]
    still = [key for key in learning if torch.equal(stages[0][key], stages[1][key])]
    assert not still, "every weight of the connector learns in the second stage, too"
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], weight) for key, weight in stages[1].items())

    alone = answers(predictor, sized_folder, 1)
    assert alone == answers(predictor, sized_folder, 8)
    assert len(set(alone)) > 1


def test_a_text_gate_learns_and_has_the_width_of_the_language_model(trained: TrainedModels) -> None:
    model = load_model(trained["text_gated"])
    assert model.config.fuser["condition_channels"] == 32 and model.model.fuser.group_sizes == (2, 2)
    assert any(parameter.abs().sum() > 0 for parameter in model.model.fuser.weight_head.parameters())
