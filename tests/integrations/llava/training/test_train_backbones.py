"""Several backbones from a recipe: what a trained model holds, converted; what a recipe may say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from integrations.llava.checkpoints.convert import convert
from integrations.llava.checkpoints.model_io import load_model, load_processor
from integrations.llava.config import Recipe, dump_recipe, load_recipe, parse_overrides
from integrations.llava.dry_run import dry_run, render
from integrations.llava.inference.predictor import load_predictor
from integrations.llava.modeling import build_recipe_model, read_language_files
from layerfuse.preprocessing import CLIP_MEAN, IMAGENET_MEAN, StackedPreprocessing
from tests.integrations.llava.training.trained_models import (
    DINO,
    MODELS,
    SIGLIP,
    VIT,
    TrainedModels,
    answers,
    model_recipe,
)

TWO = {f"model.{name}": value for name, value in MODELS["two_backbones-concat"].items() if name != "backbone_options"}


@pytest.fixture(scope="module")
def recipe(backbone_folder: Path, llm_folder: Path, sized_folder: Path) -> Recipe:
    return model_recipe("two_backbones-injection", backbone_folder, llm_folder, sized_folder)


@pytest.mark.parametrize("fuser", ["concat", "mmfuser"])
def test_each_backbone_of_a_trained_model_sees_its_own_picture(
    fuser: str, trained: TrainedModels, pictures: list[Image.Image], sized_folder: Path, tmp_path: Path
) -> None:
    """`concat` with layer injection, too."""
    folder = trained["two_backbones-injection" if fuser == "concat" else "two_backbones-mmfuser"]
    model = load_model(folder)
    backbone = model.model.vision_tower.backbone
    assert [member.image_size for member in backbone.members] == [(32, 32), (48, 48)]
    pixels = load_processor(folder).image_processor(pictures)["pixel_values"]
    assert pixels.shape == (8, 6, 48, 48)
    prepared = backbone.preprocessing
    assert isinstance(prepared, StackedPreprocessing)
    assert prepared.parts[0].mean == (CLIP_MEAN if fuser == "mmfuser" else IMAGENET_MEAN) != prepared.parts[1].mean
    found = backbone(pixels)
    for source, (part, member, corner) in enumerate(
        zip(prepared.parts, backbone.members, (pixels[:, :3, :32, :32], pixels[:, 3:]), strict=True)
    ):
        assert torch.equal(corner, part.changed(mode="pad", upright=True).batch(pictures))
        if found.grids[backbone.taps.index((source, member.layers[0]))] == member.grids()[0]:
            assert torch.equal(found[backbone.taps.index((source, member.layers[0]))], member(corner)[0])
    if fuser == "concat":
        # The fuser's maps stand in front, the layer of the second backbone that is only injected behind them.
        assert backbone.taps == ((0, 1), (0, 2), (1, 3), (1, 1))
        assert model.config.injection["pairs"] == [[[1, 1], 0], [[0, 2], 1]]
        assert model.model.fuser.in_channels == (32, 32, 48)
        stage_1 = load_file(folder / "pretrain" / "adapter.safetensors")
        assert all(stage_1[f"model.injection.mergers.{index}.linear_2.weight"].any() for index in range(2))
    else:
        assert model.model.fuser_grids == ((4, 4), (4, 4), (6, 6))
    assert model.config.layout.num_tokens() == (36 if fuser == "mmfuser" else 16)

    # Text alone touches every trained parameter, as if there were a black picture.
    text = torch.tensor([[1, 5, 6]])
    model.train()(input_ids=text, labels=text).loss.backward()
    assert all(weight.grad is not None for weight in model.model.fuser.parameters())
    kinds = model.model.vision_tower._no_split_modules
    assert "Block" in kinds and not any("Backbone" in kind for kind in kinds)

    convert(folder, tmp_path / "copy")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "copy" / "model.safetensors")[name], tensor)
    copied = load_predictor(tmp_path / "copy")
    assert answers(copied, sized_folder, 8) == answers(load_predictor(folder), sized_folder, 8)
    refused = "injection.*has no place" if fuser == "concat" else "has 2 backbones.*place for one"
    with pytest.raises(ValueError, match=refused):
        convert(folder, tmp_path / "theirs", "llava-hf")
    file = tmp_path / "copy" / "processor_config.json"
    saved = json.loads(file.read_text())
    saved["image_processor"]["preprocessing"]["parts"].pop()
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="prepares images for 1 backbones, and .* has 2"):
        load_model(tmp_path / "copy")


def test_a_recipe_says_backbones_as_a_list(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml").model == recipe.model
    first, second = recipe.model.backbones
    assert (first.name, first.layers, first.image_size, first.options) == (f"timm:{DINO}", (1, -2), 32, VIT)
    assert (second.name, second.layers, second.image_size) == (f"timm:{SIGLIP}", (3,), 48)
    # A folder beside the recipe, another family for each, one number for a list of one, and a base that had options.
    (tmp_path / "mine.yaml").write_text(
        "base: recipe.yaml\nmodel:\n  family: [transformers, timm]\n  backbone: [./clip, b]\n  layers: [[1, 2], 3]\n"
        "  image_size: null\n  grid: [5, 5]"
    )
    model = load_recipe(tmp_path / "mine.yaml").model
    assert [own.name for own in model.backbones] == [f"transformers:{tmp_path / 'clip'}", "timm:b"]
    assert (model.layers, model.backbone_options, model.image_size, model.grid) == (((1, 2), (3,)), {}, None, (5, 5))
    words = ["--model.backbone", "a", "b", "--model.layers", "[[1, 2], [-2]]", "--model.image-size", "32", "48"]
    given = parse_overrides([*words, "--model.backbone-options", "{}"])
    assert load_recipe("mmfuser_7b", given).model.backbones[1].layers == (-2,)
    assert load_recipe("mmfuser_7b", given).model.image_size == (32, 48)
    assert parse_overrides(["--model.backbone", "[a, b]"]) == {"model.backbone": ["a", "b"]}
    single = parse_overrides(["--model.backbone", "a", "--model.layers", "3,8,-2", "--model.image-size", "32"])
    assert single == {"model.backbone": "a", "model.layers": [3, 8, -2], "model.image_size": 32}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": [1, 2]}, r"layers=\(1, 2\) are for 2 backbones; give a list of layers for each"),
        ({"layers": [[1], [2], [3]]}, "are for 2 backbones"),
        ({"backbone": [], "layers": []}, "backbone is an empty list; name one backbone, or list several"),
        ({"layers": [[1, 1], [2]]}, r"layers=\(1, 1\) names 1 twice"),
        ({"image_size": [32, 48, 64]}, "image_size has 3 entries for 2 backbones in `backbone`; give one value, or"),
        ({"image_size": [0, 48]}, r"image_size\[0\]=0 is too small"),
        ({"family": ["timm"]}, "family has 1 entries for 2 backbones"),
        ({"backbone": []}, "backbone is an empty list; name one backbone, or list several"),
        ({"backbone": [], "layers": None}, "backbone is an empty list"),
        ({"backbone": "a", "layers": 1, "image_size": []}, "image_size has 0 entries for one backbone in"),
        ({"backbone": "a", "layers": 1, "image_size": 32, "backbone_options": []}, "backbone_options has 0 entries"),
        ({"backbone": "a"}, "are for several backbones, and backbone names one"),
        ({"backbone": "a", "layers": 1, "image_size": [32, 48]}, "image_size has 2 entries for one backbone in"),
        ({"grid": [4]}, r"grid=\[4\] is \(H, W\), in patches"),
        ({"grid": [4, 4], "resample": "none"}, "leave it out for one backbone and with resample: none"),
        ({"resample": "area"}, "resample is 'area'; give one of: bilinear, bicubic, nearest, none"),
        ({"injection.pairs": [[[1, 2, 3], 0]]}, r"pairs has \[1, 2, 3\] for a layer of one of several backbones"),
        ({"injection.pairs": [[1, [0, 1]]]}, "give \\[layer of the backbone, decoder layer\\] each"),
    ],
)
def test_lists_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    overrides = TWO | {f"model.{name}": value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        load_recipe("mmfuser_7b", overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection.pairs": ((3, 0),)}, None),
        ({"injection.pairs": ((1, 0), ((1, 1), 1))}, "names layer 1, which 2 of the 2 backbones tap; say of which"),
        ({"injection.pairs": ((0, 0),)}, "names layer 0, which none of the 2 backbones tap"),
        ({"injection.pairs": ((2, (0, 2), 0),), "injection.merger": "concat"}, r"reads the tap \(0, 2\) twice"),
        ({"injection.pairs": (((2, 1), 0),)}, r"names backbone 2 in \[2, 1\]; there are 2, counted from 0"),
        (
            {"injection.pairs": (((0, 1), (1, 3), 0),), "injection.merger": "concat", "resample": "none"}
            | {"fuser_options": {"resize": "nearest", "grid": [4, 4]}},
            r"joins the taps \[\(0, 1\), \(1, 3\)\], whose maps lie on several grids: \[\(4, 4\), \(6, 6\)\]",
        ),
    ],
)
def test_a_tap_is_looked_up_by_backbone_and_layer(changes: dict[str, Any], message: str | None, recipe: Recipe) -> None:
    config = recipe.model
    injection = dataclasses.replace(
        config.injection, **{name[10:]: value for name, value in changes.items() if name.startswith("injection.")}
    )
    own = {name: value for name, value in changes.items() if "." not in name}
    config = dataclasses.replace(config, injection=injection, **own)
    files = read_language_files(config)
    if message is None:
        model = build_recipe_model(config, files, device="meta")
        assert model.config.injection["pairs"] == (((1, 3), 0),)
        return
    with pytest.raises(ValueError, match=message):
        build_recipe_model(config, files, device="meta")


def test_a_dry_run_counts_every_backbone(recipe: Recipe) -> None:
    both = dry_run(recipe)
    page = render(both)
    for line in (
        rf"backbone +timm {DINO}",
        rf"backbone +timm {SIGLIP}",
        r"layers 1, 2 of 3, 32 x 32 pixels",
        r"layers 3, 1 of 3, 48 x 48 pixels",
        r"concat: 3 maps of 4 x 4 x 32, 4 x 4 x 48",
        r"layers 1 of backbone 1 -> 0, 2 -> 1, before",
    ):
        assert re.search(line, page), line
    apart = []
    for place in range(2):
        own = recipe.model.backbones[place]
        model = dataclasses.replace(
            recipe.model,
            backbone=(DINO, SIGLIP)[place],
            layers=(1, 2) if place == 0 else (3, 1),
            image_size=own.image_size,
            backbone_options=dict(own.options),
            injection=type(recipe.model.injection)(),
        )
        apart.append(dry_run(dataclasses.replace(recipe, model=model)))
    flops, alone = ([stage.flops["backbone"].forward for stage in report.stages[:1]] for report in (both, apart[0]))
    assert flops[0] == pytest.approx(alone[0] + apart[1].stages[0].flops["backbone"].forward)
