"""AnyRes from a recipe, with data of many sizes: what a trained model holds; evaluated, estimated, checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integrations.llava.checkpoints import convert, convert_connector, load_model
from integrations.llava.cli.data import main as data_command
from integrations.llava.config import Recipe, dump_recipe, load_recipe
from integrations.llava.data import grouping_lengths, image_names, read_samples, sample_lengths
from integrations.llava.dry_run import dry_run, render
from integrations.llava.evaluation import evaluate
from integrations.llava.image_layout import AnyResLayout, FixedLayout, default_pinpoints
from integrations.llava.inference.conversation import Conversation
from integrations.llava.inference.predictor import load_predictor
from integrations.llava.inference.sampling import SamplingParams
from integrations.llava.training.stage import Stage
from tests.integrations.llava.training.trained_models import SIZES, TrainedModels, model_recipe

LAYOUT = AnyResLayout(1, (32, 32), (4, 4), default_pinpoints((32, 32)))


@pytest.fixture(scope="module")
def recipe(backbone_folder: Path, llm_folder: Path, sized_folder: Path) -> Recipe:
    return model_recipe("anyres-mmfuser", backbone_folder, llm_folder, sized_folder)


def cut_at(recipe: Recipe, *pinpoints: tuple[int, int]) -> Recipe:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, pinpoints=pinpoints))


@pytest.mark.parametrize("name", ["anyres-injection", "anyres-mmfuser", "anyres-text_gated"])
def test_a_trained_model_holds_its_layout_and_a_newline_that_learned(name: str, trained: TrainedModels) -> None:
    run = trained[name]
    first, second = (load_file(run / stage / "adapter.safetensors") for stage in ("pretrain", "finetune"))
    saved = load_file(run / "model.safetensors")["model.image_newline"]

    assert first["model.image_newline"].shape == (32,)
    assert not torch.equal(first["model.image_newline"], second["model.image_newline"]), "the newline learns"
    assert torch.equal(saved, second["model.image_newline"])
    layout = load_model(run).config.layout
    assert layout == dataclasses.replace(LAYOUT, image_token_id=layout.image_token_id)


def test_a_conversation_and_an_evaluation_answer_as_the_predictor(trained: TrainedModels, sized_folder: Path) -> None:
    run, folder = trained["anyres-injection"], sized_folder
    predictor = load_predictor(run)
    chat = Conversation(predictor, SamplingParams(max_new_tokens=4))
    room = chat.room("What?")
    chat.show(folder / "1.png")
    chat.show(folder / "2.png")
    assert room is not None and chat.room("What?") is not None
    assert room - (chat.room("What?") or 0) >= sum(map(LAYOUT.num_tokens, SIZES[1:3]))
    said = "".join(chat.say("What?"))
    assert said == predictor([[folder / "1.png", folder / "2.png"]], ["What?"], max_new_tokens=4)[0]
    "".join(chat.say("And now?"))
    assert len(chat.images) == 2

    found = evaluate(run, folder / "questions.jsonl", folder, max_new_tokens=4, batch_size=3)
    one = predictor([folder / f"{index}.png" for index in range(8)], ["What number?"] * 8, max_new_tokens=4)
    assert found is not None
    assert [answer.prediction for answer in found.answers] == one


def test_only_our_own_layout_holds_a_model_with_tiles(trained: TrainedModels, tmp_path: Path) -> None:
    run = trained["anyres-injection"]
    copied = load_file(convert(run, tmp_path / "copy") / "model.safetensors")
    for name, tensor in load_file(run / "model.safetensors").items():
        assert torch.equal(copied[name], tensor), name
    assert load_model(tmp_path / "copy").config.layout == load_model(run).config.layout
    with pytest.raises(ValueError, match="tokens of an image depend on its size here .image layout 'anyres'"):
        convert(run, tmp_path / "theirs", "llava-hf")
    connector = convert_connector(run, tmp_path / "connector")
    assert "model.image_newline" in load_file(connector)


def test_a_recipe_holds_its_layout(recipe: Recipe, tmp_path: Path) -> None:
    own = cut_at(recipe, (32, 64), (96, 32))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(own))

    assert load_recipe(tmp_path / "recipe.yaml").model == own.model
    assert load_recipe("mmfuser_7b").model.image_layout == "fixed"
    for given, message in (
        ({"model.image_layout": "tiles"}, r"model\.image_layout is 'tiles'; give one of: fixed, anyres"),
        ({"model.pinpoints": [[336, 672]]}, "pinpoints is given, and image_layout is 'fixed'"),
        ({"model.pinpoints": [336, 672]}, r"pinpoints has \[336\]; give a list of \[height"),
        ({"model.pinpoints": "336x672"}, r"model\.pinpoints is '336x672'; give lists of numbers in a list"),
        ({"model.pinpoints": ["336x672"]}, r"model\.pinpoints is '336x672'; give lists of numbers in a list"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe("mmfuser_7b", given)
    with pytest.raises(ValueError, match="pinpoint 40 x 32 .height x width. is no whole number of tiles of 32 x 32"):
        dry_run(cut_at(recipe, (40, 32)))


def test_batches_are_grouped_by_words_and_the_tokens_of_images(sized_folder: Path) -> None:
    folder = sized_folder
    samples = read_samples(folder / "train.json")
    words = sample_lengths(samples).tolist()
    lengths = grouping_lengths(samples, LAYOUT, folder, upright=False)
    expected = [
        count + sum(LAYOUT.num_tokens(SIZES[int(name[0])]) for name in image_names(sample))
        for count, sample in zip(words, samples, strict=True)
    ]

    assert lengths == expected
    assert [length < 0 for length in lengths] == [not image_names(sample) for sample in samples]
    assert grouping_lengths(samples, FixedLayout(1, 16), folder, upright=False) == words


@pytest.mark.parametrize(("bad_samples", "said"), [("skip", "is left out"), ("fail", "stops the run")])
def test_a_stage_says_that_images_may_not_fit(
    bad_samples: Any, said: str, recipe: Recipe, sized_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def count(max_length: int) -> Any:
        config = dataclasses.replace(recipe.finetune.data, bad_samples=bad_samples)
        stage: Any = SimpleNamespace(
            assembled=SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(layout=LAYOUT))),
            config=SimpleNamespace(data=dataclasses.replace(config, max_length=max_length)),
            samples=read_samples(sized_folder / "train.json"),
            lengths=[1],
        )
        Stage._count_images(stage)
        return stage.lengths

    assert len(count(88)) == 12 and not caplog.records
    count(87)
    assert f"up to 88 positions, and data.max_length is 87: a sample whose images do not fit {said}" in caplog.text


def test_a_dry_run_counts_tiles(recipe: Recipe) -> None:
    """Data are measured by their images' sizes; without data each image is the one of most tokens."""
    measured = dry_run(recipe)
    work = measured.stages[1].workload
    assert work.image_tokens == pytest.approx(sum(map(LAYOUT.num_tokens, SIZES)) / 12)
    assert work.tiles == pytest.approx(sum(map(LAYOUT.num_tiles, SIZES)) / 12)
    assert "up to 88 tokens: 64 x 64 pixels (height x width), 5 tiles" in render(measured)

    empty = {name: dataclasses.replace(recipe.stage(name).data, path="") for name in ("pretrain", "finetune")}
    stages = {name: dataclasses.replace(recipe.stage(name), data=data) for name, data in empty.items()}
    assumed = dry_run(dataclasses.replace(recipe, **stages))  # type: ignore[arg-type]
    fixed = dry_run(
        dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, image_layout="fixed"), **stages)  # type: ignore[arg-type]
    )
    for own, other in zip(assumed.stages, fixed.stages, strict=True):
        assert own.facts.tokens_per_image == 16 + 8 * 9
        assert (own.workload.tiles, own.workload.images) == (5, 1)
        assert "each with an image of 64 x 64 pixels, the most tokens there are" in own.workload.origin
        for part in ("backbone", "fuser", "projector"):
            assert own.flops[part].forward == 5 * other.flops[part].forward
        # The newline beside them; what autograd keeps grows with the tiles.
        assert own.facts.trained["projector"] == other.facts.trained["projector"] + 32
        assert own.facts.connector_bytes > 4 * other.facts.connector_bytes


def test_the_data_command_counts_tiles(
    sized_folder: Path, llm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sized_folder

    def problems(*options: str) -> int:
        common = ["--data", str(folder / "train.json"), "--image-folder", str(folder), "--tokenizer", str(llm_folder)]
        return data_command(["check", *common, "--image-tokens", "16", *options])

    assert problems("--max-length", "150") == 0
    capsys.readouterr()
    assert problems("--max-length", "150", "--anyres", "32") == 1
    assert "images exceed max_length" in capsys.readouterr().out
    # One tile beside the overview takes no more than 2 * 16 and 4 newlines.
    assert problems("--max-length", "150", "--anyres", "32", "--pinpoints", "32x32") == 0
    assert problems("--max-length", "150", "--anyres", "32", "--pinpoints", "32x32", "64x64") == 1
    for options, message in (
        (["--anyres", "32", "--pinpoints", "32,64"], "--pinpoints 32,64: give height x width in pixels each, such"),
        (["--anyres", "32", "--pinpoints", "40x32"], "pinpoint 40 x 32 (height x width) is no whole number of tiles"),
        (["--pinpoints", "32x32"], "give --anyres EDGE, too"),
    ):
        capsys.readouterr()
        assert problems(*options) == 1
        assert message in capsys.readouterr().err
    assert problems("--image-tokens", "15", "--anyres", "32") == 1
    assert "--image-tokens 15 make no square tile" in capsys.readouterr().err
