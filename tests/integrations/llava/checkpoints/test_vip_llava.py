"""transformers' VipLlava becomes ours, computes and answers the same, and goes back."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, VipLlavaForConditionalGeneration

from integrations.llava.checkpoints import Options, convert, convert_connector, layout_of
from integrations.llava.checkpoints.connector import load_connector
from integrations.llava.checkpoints.model_io import load_model, load_processor
from integrations.llava.checkpoints.tensors import stored_model
from tests.integrations.llava.checkpoints.foreign import logits_of, save_llava_hf, tiny_vip_llava, write_weights
from tests.integrations.llava.tiny_parts import make_tokenizer

VOCABULARY = len(make_tokenizer("llama"))


@pytest.fixture(scope="module")
def model() -> VipLlavaForConditionalGeneration:
    return tiny_vip_llava(vocabulary=VOCABULARY + 6, image_token=VOCABULARY)


@pytest.fixture(scope="module")
def folder(model: VipLlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("vip") / "checkpoint"
    save_llava_hf(model, saved)
    return saved


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(folder, tmp_path_factory.mktemp("vip-ours") / "ours")


def change_config(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> None:
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


def with_old_name(config: dict[str, Any], layers: list[int]) -> None:
    """Name the layers as every version of transformers reads them."""
    config.pop("vision_feature_layer", None)
    config["vision_feature_layers"] = layers


@pytest.mark.parametrize("keys", ["saved", "hub", "new"])
def test_any_layout_of_keys_computes_the_same_and_goes_back(
    keys: str, model: VipLlavaForConditionalGeneration, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_llava_hf(model, source, keys=keys)
    described = json.loads((source / "config.json").read_text())
    if keys == "hub":
        # As the files there, and earlier versions of transformers, call them.
        change_config(source, lambda config: with_old_name(config, [-2, -3, -6, 2]))
    assert layout_of(source) == "vip-llava"
    ours = load_model(convert(source, tmp_path / "ours"))
    assert ours.model.vision_tower.backbone.layers == (5, 4, 1, 2)
    fuser = ours.model.fuser.config
    assert (fuser["name"], fuser["norm"], fuser["norm_eps"]) == ("concat", "layer", 1e-3)
    expected = logits_of(model, VOCABULARY)
    torch.testing.assert_close(logits_of(ours, VOCABULARY), expected, atol=1e-5, rtol=0)

    back = convert(tmp_path / "ours", tmp_path / "back", "vip-llava")
    assert layout_of(back) == "vip-llava"
    loaded, report = VipLlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert json.loads((back / "config.json").read_text()) == described
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("layers", [-2, [3], [0, 6, -2]], ids=str)
def test_any_layers_of_the_tower_are_taken(layers: Any, tmp_path: Path) -> None:
    model = tiny_vip_llava(vocabulary=VOCABULARY + 2, image_token=VOCABULARY, layers=layers, eps=1e-5)
    save_llava_hf(model, tmp_path / "source")
    ours = convert(tmp_path / "source", tmp_path / "ours")
    expected = logits_of(model, VOCABULARY)
    torch.testing.assert_close(logits_of(load_model(ours), VOCABULARY), expected, atol=1e-5, rtol=0)
    back = VipLlavaForConditionalGeneration.from_pretrained(convert(ours, tmp_path / "back", "vip-llava"))
    torch.testing.assert_close(logits_of(back, VOCABULARY), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [None, "pad", "squash"])
def test_a_question_about_a_picture_is_answered_the_same(
    mode: Any, model: VipLlavaForConditionalGeneration, folder: Path, tmp_path: Path
) -> None:
    ours = convert(folder, tmp_path / "ours", options=Options(image_mode=mode))
    theirs = convert(ours, tmp_path / "theirs", "vip-llava")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8))
    asked = {"images": image, "text": "USER: <image>\nWhat? ASSISTANT:", "return_tensors": "pt"}
    batch = load_processor(ours)(**asked)
    assert (batch["input_ids"] == VOCABULARY).sum() == 16
    if mode is not None:
        # Else the source's files are kept, and this one has no processor_config.json.
        described = AutoProcessor.from_pretrained(theirs, backend="pil")(**asked)
        assert described["input_ids"].tolist() == batch["input_ids"].tolist()
        torch.testing.assert_close(described["pixel_values"], batch["pixel_values"], atol=1e-6, rtol=0)
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    answer = load_model(ours).generate(**batch, **greedy)
    batch.pop("image_sizes", None)
    expected = model.generate(**batch, **greedy, suppress_tokens=[VOCABULARY])
    assert answer.shape[1] > batch["input_ids"].shape[1] and torch.equal(answer, expected)


def test_the_prompt_template_is_said_to_be_a_choice(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    convert(folder, tmp_path / "ours", options=Options(template="llava_v1"))
    assert "prompt template" not in caplog.text
    convert(folder, tmp_path / "again")
    assert "do not hold their prompt template; taking v1" in caplog.text


def test_fuser_and_projector_alone_are_read(ours: Path, folder: Path, tmp_path: Path) -> None:
    model = load_model(ours)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for part in (model.model.fuser, model.model.multi_modal_projector):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    load_connector(model, ("fuser", "projector"), convert_connector(folder, tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="the layout vip-llava has no files of connectors"):
        convert_connector(ours, tmp_path / "out", "vip-llava")
    for layout in ("mmfuser", "llava"):
        for source in (ours, folder):
            with pytest.raises(
                ValueError, match="has the fuser 'concat' of ViP-LLaVA; .* no place for it. Give 'layerf"
            ):
                convert_connector(source, tmp_path / "out", layout)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_hidden_act": "relu"}, "this checkpoint is no ViP-LLaVA: projector_hidden_act is 'relu', expected"),
        ({"image_token_index": 3}, "image_token_index is 3, but the tokenizer's <image> is"),
        ({"vision_feature_layers": [-2, 9]}, r"layer 9 is outside this backbone \(6 blocks"),
        ({"vision_feature_layers": [-2, 5]}, "ask for the same map more than once"),
        ({"vision_feature_layers": [-2, 5, 4, 3]}, "more than once"),
        ({"vision_feature_layers": [-2, -3]}, r"weights of .* are not those of the model .*model.fuser.norm.weight"),
        (
            {"model_type": "llava_next"},
            "holds a 'llava_next' model of .*'VipLlavaForConditionalGeneration'.*vip-llava: ",
        ),
    ],
    ids=str,
)
def test_other_models_are_refused(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    layers = changes.get("vision_feature_layers", [-2, -3, -6, 2])
    change_config(source, lambda config: [config.update(changes), with_old_name(config, layers)])
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_folder_without_the_norm_is_refused(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    weights = {name: tensor.read() for name, tensor in stored_model(folder).items() if "layernorm.bias" not in name}
    write_weights(weights, source)
    with pytest.raises(ValueError, match=r"are not those of the model its config describes.*model.fuser.norm.bias"):
        convert(source, tmp_path / "target")


def test_a_tower_without_class_token_is_refused(tmp_path: Path) -> None:
    """Of such a tower transformers' VipLlava would leave out a patch."""
    model = tiny_vip_llava(vocabulary=VOCABULARY + 2, image_token=VOCABULARY, tower="siglip")
    save_llava_hf(model, tmp_path / "source")
    with pytest.raises(ValueError, match="the vision model has 0 tokens in front of the patches, expected one"):
        convert(tmp_path / "source", tmp_path / "target")


def test_each_layout_takes_its_own_fuser(ours: Path, mmfuser_folder: Path, tmp_path: Path) -> None:
    for layout, message in (
        ("llava-hf", "has the fuser 'concat' over 4 layers; transformers' LLaVA has no place for a fuser"),
        ("llava", "has the fuser 'concat' over 4 layers, and LLaVA-1.5 has no place"),
        ("mmfuser", "the fuser 'concat' over 4 layers with .* the published code has only 'mmfuser'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(ours, tmp_path / "target", layout)
    fused = convert(mmfuser_folder, tmp_path / "mmfuser")
    with pytest.raises(
        ValueError, match="fuser 'mmfuser' over 5 layers with .*; transformers' VipLlava has only 'concat'"
    ):
        convert(fused, tmp_path / "target", "vip-llava")
    interleaved = tmp_path / "interleaved"
    shutil.copytree(ours, interleaved)
    change_config(interleaved, lambda config: config["fuser"].update(order="interleaved"))
    with pytest.raises(ValueError, match=r"'order': 'interleaved'.* has only 'concat' with .*'order': 'blocks'"):
        convert(interleaved, tmp_path / "target", "vip-llava")
