"""A checkpoint of any layout as the source of a run's model: what it gives is what its conversion is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from integrations.llava.checkpoints import Checkpoint, convert, load_model, load_processor, model_source
from integrations.llava.config import ModelConfig, load_recipe
from integrations.llava.inference import load_predictor
from tests.integrations.llava.checkpoints.foreign import save_llava_hf, tiny_vip_llava
from tests.integrations.llava.tiny_parts import make_tokenizer

FOLDERS = ["run", "mmfuser_folder", "llava_folder", "llava_hf_folder", "vip_folder"]


@pytest.fixture(scope="module")
def vip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VipLlava of transformers."""
    folder, size = tmp_path_factory.mktemp("vip") / "checkpoint", len(make_tokenizer("llama"))
    save_llava_hf(tiny_vip_llava(vocabulary=size + 6, image_token=size), folder)
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_the_model_of_a_stage_is_the_converted_one(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(name)
    recipe = load_recipe(None, {"model.checkpoint": str(folder)})
    source = model_source(recipe.model)
    ours = folder if name == "run" else convert(folder, tmp_path / "ours")
    expected = load_model(ours)
    assembled = source.assemble(recipe.finetune)

    assert isinstance(source, Checkpoint) and source.has_connector
    meta = source.on_meta(recipe.finetune)
    for model in (assembled.model, load_model(folder)):
        state = model.state_dict()
        assert state.keys() == expected.state_dict().keys() == meta.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.state_dict().items())
        # Tables that no checkpoint holds are computed, too.
        tables = dict(model.named_buffers())
        assert all(torch.equal(tables[key], tensor) for key, tensor in expected.named_buffers())
        assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id
        assert model.generation_config.suppress_tokens == expected.generation_config.suppress_tokens
    assert {key: p.requires_grad for key, p in meta.named_parameters()} == {
        key: p.requires_grad for key, p in assembled.model.named_parameters()
    }
    resolved = source.resolved(recipe).finetune
    assert resolved.template == expected.config.prompt_template["name"]
    processor = load_processor(ours)
    assert resolved.data.image_mode == processor.image_processor.preprocessing["mode"]
    assert assembled.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["run", "llava_folder"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_has_learned_changes_neither_the_next_one_nor_the_files(
    name: str, precision: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    overrides = {"model.checkpoint": str(folder), "finetune.precision": precision, "finetune.trainable": ["projector"]}
    recipe = load_recipe(None, overrides)
    source = model_source(recipe.model)
    first = source.assemble(recipe.finetune).model
    expected = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    again = source.assemble(recipe.finetune).model.state_dict()

    assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("name", ["llava_folder", "vip_folder"])
def test_a_checkpoint_of_another_layout_answers_as_its_conversion(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    theirs, ours = load_predictor(folder), load_predictor(convert(folder, tmp_path / "ours"))
    assert theirs([None], ["What number is it?"]) == ours([None], ["What number is it?"])
    assert theirs.model.config.prompt_template == ours.model.config.prompt_template


def test_the_digest_is_of_weights_wherever_they_lie(llava_folder: Path, mmfuser_folder: Path, tmp_path: Path) -> None:
    """A checkpoint without vision model is also the one that it names."""

    def digest(folder: Path) -> str:
        source = model_source(ModelConfig(checkpoint=str(folder)))
        assert isinstance(source, Checkpoint)
        return source.digest

    copied = Path(shutil.copytree(llava_folder.parent, tmp_path / "copied"))
    checkpoint = copied / llava_folder.name
    assert digest(checkpoint) == digest(llava_folder) != digest(mmfuser_folder)
    (tower,) = [path.parent for path in copied.glob("*/model.safetensors") if path.parent != checkpoint]
    raw = bytearray((tower / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tower / "model.safetensors").write_bytes(raw)
    assert digest(checkpoint) != digest(llava_folder)
