"""What is not converted, and what the message says."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from integrations.llava.checkpoints import Options, convert, layout_of
from integrations.llava.checkpoints.model_io import load_model
from layerfuse.fusers.mmfuser import MMFuser, to_published_state_dict
from tests.integrations.llava.tiny_parts import RunsCode

FUSER = "model.mm_projector.0."
Weights = dict[str, torch.Tensor]


@pytest.fixture
def source(mmfuser_folder: Path, tmp_path: Path) -> Path:
    """A copy of the published MMFuser, for each test to damage."""
    shutil.copytree(mmfuser_folder.parent, tmp_path / "copy")
    return tmp_path / "copy" / mmfuser_folder.name


def change_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def refuse(source: Path, message: str, layout: str = "layerfuse", options: Options | None = None) -> None:
    target = source.parent / "target"
    with pytest.raises(ValueError, match=message):
        convert(source, target, layout, options=options)
    assert not target.exists() or not any(target.iterdir())


# Fusers that lost their scales


@pytest.mark.parametrize("name", ["gamma1", "gamma2"])
def test_a_missing_scale(source: Path, name: str) -> None:
    change_weights(source, lambda weights: weights.pop(FUSER + name))
    refuse(source, f"lack {name}; without them the block would be the identity. .* Take the files that the training")


def test_renamed_scales(source: Path) -> None:
    def rename(weights: Weights) -> None:
        for number in "12":
            weights[f"{FUSER}weight{number}"] = weights.pop(f"{FUSER}gamma{number}")

    change_weights(source, rename)
    refuse(source, r"lack gamma1, gamma2 \(found instead: weight1, weight2\); .*'gamma' becomes 'weight'")


def test_zero_scales_of_a_fuser_that_was_trained(source: Path) -> None:
    def zero(weights: Weights) -> None:
        for number in "12":
            weights[f"{FUSER}gamma{number}"].zero_()

    change_weights(source, zero)
    refuse(source, r"gamma1 is zero everywhere although the fuser was trained \(.*attention_weights.weight.*moved\)")


def test_scales_that_are_no_numbers(source: Path) -> None:
    change_weights(source, lambda weights: weights[f"{FUSER}gamma2"].fill_(float("nan")))
    refuse(source, "gamma1 and gamma2 are not finite: memory that was never written")


def test_zero_scales_of_a_new_fuser_are_no_fault(source: Path) -> None:
    new = to_published_state_dict(MMFuser(32, 5).state_dict())
    change_weights(source, lambda weights: weights.update({FUSER + name: tensor for name, tensor in new.items()}))
    model = load_model(convert(source, source.parent / "target"))
    assert not model.model.fuser.output_scale.scale.any()


def test_a_converted_model_without_its_scales_is_not_loaded(mmfuser_folder: Path, tmp_path: Path) -> None:
    ours = convert(mmfuser_folder, tmp_path / "ours")
    change_weights(ours, lambda weights: weights.pop("model.fuser.output_scale.scale"))
    for load in (load_model, lambda folder: convert(folder, tmp_path / "again")):
        with pytest.raises(ValueError, match="[Mm]issing: model.fuser.output_scale.scale"):
            load(ours)


# Weights that do not fit


def test_missing_unknown_and_misshapen_weights_are_all_listed(source: Path) -> None:
    def change(weights: Weights) -> None:
        del weights["model.norm.weight"]
        weights["model.image_newline"] = torch.zeros(3)
        weights["model.vision_tower.vision_tower.vision_model.head.weight"] = torch.zeros(3)
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)

    change_weights(source, change)
    refuse(
        source,
        r"Missing: model.language_model.norm.weight; unexpected: model.image_newline, "
        r"model.vision_tower.backbone.model.head.weight; of another shape: "
        r"model.language_model.layers.0.mlp.up_proj.weight \(3, 3\), expected \(48, 32\)",
    )


def test_a_projector_of_another_kind(source: Path) -> None:
    change_weights(source, lambda weights: weights.update({"model.mm_projector.5.weight": torch.zeros(3)}))
    refuse(source, "behind a fuser does not have: mm_projector.5.weight. Only mlp2x_gelu can be converted")


def test_a_baseline_projector_of_another_kind(llava_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llava_folder.parent, tmp_path / "copy")
    source = tmp_path / "copy" / llava_folder.name
    shard = source / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(shard) | {"model.mm_projector.4.weight": torch.zeros(3)}, shard)
    refuse(source, "has parts that mlp2x_gelu does not have: mm_projector.4.weight")


def test_two_weights_for_one(source: Path) -> None:
    name = "model.vision_tower.vision_tower.{}post_layernorm.weight"
    twice = {name.format(""): torch.zeros(32), name.format("vision_model."): torch.zeros(32)}
    change_weights(source, lambda weights: weights.update(twice))
    refuse(source, "two weights stand for model.vision_tower.backbone.model.post_layernorm.weight")


# Configs of other models


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', can be 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True, can be False"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch', can be 'patch'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres', can be 'square' or 'pad' or None"),
        ({"model_type": "llava_mistral"}, "none of LLaVA-1.5 or MMFuser with a Llama: model_type is 'llava_mistral'"),
        ({"mm_vision_select_layer": [-5, -4, -3, -2]}, r"is \[-5, -4, -3, -2\]; expected 5 layers, four values and"),
        ({"mm_vision_select_layer": -2}, "is -2; expected 5 layers"),
    ],
)
def test_configs_of_other_models(source: Path, changes: dict[str, Any], message: str) -> None:
    change_config(source, **changes)
    refuse(source, message)


def test_several_layers_without_a_fuser(llava_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llava_folder.parent, tmp_path / "copy")
    source = tmp_path / "copy" / llava_folder.name
    change_config(source, mm_vision_select_layer=[-3, -2])
    refuse(source, r"is \[-3, -2\]; expected one layer, since there is no fuser")


def test_a_language_model_alone_has_no_layout(llm_folder: Path) -> None:
    with pytest.raises(
        ValueError, match="holds a 'llama' model of .*, which is none of layerfuse, mmfuser, llava, llava-hf"
    ):
        layout_of(llm_folder)


def test_a_folder_without_config_or_tokenizer(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no config.json; give the folder of a checkpoint"):
        convert(tmp_path, tmp_path / "target")
    for name in ("tokenizer.model", "tokenizer.json"):
        (source / name).unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer; expected tokenizer.model or tokenizer.json"):
        convert(source, tmp_path / "target")


def test_our_own_model_without_a_prompt_template(mmfuser_folder: Path, tmp_path: Path) -> None:
    ours = convert(mmfuser_folder, tmp_path / "ours")
    change_config(ours, prompt_template=...)
    refuse(ours, "holds no prompt template; say which one it was trained with: --template v1")
    again = convert(ours, tmp_path / "again", options=Options(template="brief"))
    assert load_model(again).config.prompt_template["name"] == "brief"


# The vision model


def test_a_vision_model_that_cannot_be_found(source: Path) -> None:
    shutil.rmtree(source.parent / "tiny-clip")
    refuse(source, "the vision model 'tiny-clip' is no folder beside the checkpoint and cannot be got from the hub")


def test_a_vision_model_elsewhere_is_given_by_an_option(source: Path, tmp_path: Path) -> None:
    elsewhere = shutil.move(source.parent / "tiny-clip", tmp_path / "elsewhere-clip")
    options = Options(vision_tower=str(elsewhere))
    assert load_model(convert(source, tmp_path / "ours", options=options))


def test_a_fuser_with_other_settings_than_the_published_one(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    refuse(
        tmp_path / "run", "over 4 layers with .*'num_heads': 4.*; the published code has only 'mmfuser' ov", "mmfuser"
    )


def test_the_layouts_without_fuser_take_none(mmfuser_folder: Path, tmp_path: Path) -> None:
    ours = convert(mmfuser_folder, tmp_path / "ours")
    refuse(ours, "LLaVA-1.5 has no place for a fuser: only 'select' on one layer fits", "llava")
    refuse(ours, "transformers' LLaVA has no place for a fuser", "llava-hf")


def test_the_layout_with_a_fuser_takes_no_baseline(llava_folder: Path, tmp_path: Path) -> None:
    ours = convert(llava_folder, tmp_path / "ours")
    refuse(ours, "the fuser 'select' over 1 layers .*; the published code has only 'mmfuser'", "mmfuser")


def test_a_name_of_a_vision_model_that_the_published_code_does_not_take(llava_folder: Path, tmp_path: Path) -> None:
    ours = convert(llava_folder, tmp_path / "ours")
    refuse(ours, "is called 'eva'; .* takes only names with 'clip'", "llava", Options(vision_tower="eva"))


def test_images_that_are_squashed_have_no_place_in_the_published_code(llava_folder: Path, tmp_path: Path) -> None:
    ours = convert(llava_folder, tmp_path / "ours", options=Options(image_mode="squash"))
    refuse(ours, "images are prepared by 'squash'; the published code can pad and crop", "llava")


def test_another_vision_model_than_the_one_in_the_model_is_not_named(
    llava_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = convert(llava_folder, tmp_path / "ours")
    other = tmp_path / "other-clip"
    shutil.copytree(llava_folder.parent / "tiny-clip", other)
    assert convert(ours, tmp_path / "same", "llava", options=Options(vision_tower=str(other)))

    def scale(weights: Weights) -> None:
        name = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
        weights[name] *= 2

    change_weights(other, scale)
    refuse(
        ours,
        r"is not the one in this model \(1 weights differ: encoder.layers.1.mlp",
        "llava",
        Options(vision_tower=str(other)),
    )
    with caplog.at_level(logging.WARNING):
        convert(ours, tmp_path / "unchecked", "llava", options=Options(vision_tower="no/clip"))
    assert "it was not checked that its weights are the model's" in caplog.text


# Files


def test_code_in_a_pickle_is_refused_and_not_run(llava_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llava_folder.parent, tmp_path / "copy")
    source = tmp_path / "copy" / llava_folder.name
    shard = source / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(shard) | {"extra": RunsCode(tmp_path / "was run")}, shard)
    refuse(source, re.escape(f"{shard} holds more than tensors: Python objects, which run code") + ".*nothing was run")
    assert not (tmp_path / "was run").exists()


def test_a_folder_that_holds_something_is_not_written_to(mmfuser_folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".saving-x").mkdir()
    convert(mmfuser_folder, tmp_path)
    with pytest.raises(ValueError, match="already holds chat_template.jinja, config.json, .*; give a new or empty"):
        convert(mmfuser_folder, tmp_path)


def test_an_unknown_layout(mmfuser_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout 'mmfusr' is unknown; did you mean 'mmfuser'"):
        convert(mmfuser_folder, tmp_path / "target", "mmfusr")


def test_a_full_disk_is_reported_before_anything_is_written(
    mmfuser_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="the converted checkpoint needs"):
        convert(mmfuser_folder, tmp_path / "target")
    assert not (tmp_path / "target").exists()
