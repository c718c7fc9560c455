"""The shipped backbone, language model and tokenizer, and the recipes that make them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
)

from integrations.llava.prompts import IGNORE_INDEX
from integrations.llava.synthetic import BACKBONE_FOLDER, LLM_FOLDER
from integrations.llava.synthetic.captions import scene_words
from integrations.llava.synthetic.questions import KINDS, SceneQuestion, caption, questions_of_kind
from integrations.llava.synthetic.rendering import draw_scene
from integrations.llava.synthetic.scene import GRID, sample_scene
from tests.integrations.llava.tiny_parts import tiny_llm
from tools.make_demo_assets.__main__ import main
from tools.make_demo_assets.backbone import BackboneRecipe, coarse_words, pretrain_backbone, to_pixels
from tools.make_demo_assets.language_model import LanguageModelRecipe, Phase, pretrain_language_model
from tools.make_demo_assets.make import AssetsRecipe, answer_accuracy, is_right, make_assets
from tools.make_demo_assets.tokenizer import CELL_WORDS, build_tokenizer, cell_description
from tools.make_demo_assets.writing import SceneWriter, embed_written, place_codes

ASSETS = BACKBONE_FOLDER.parent
TINY_BACKBONE = BackboneRecipe(num_blocks=1, embed_dim=8, num_heads=2, num_images=8, batch_size=4, num_steps=2)
TINY_LLM = LanguageModelRecipe(
    num_blocks=1,
    embed_dim=16,
    num_heads=2,
    hidden_dim=16,
    num_samples=16,
    batch_size=4,
    phases=(
        Phase("words", num_steps=2, learning_rate=1e-3),
        Phase("boxes", num_steps=2, learning_rate=1e-3, place_spread=0.2, pool="boxes"),
    ),
)


def test_assets_take_at_most_12_megabytes_and_say_how_they_were_made() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert (ASSETS / "README.md").is_file()
    assert {path.name for path in ASSETS.rglob("*.safetensors")} == {"model.safetensors"}


@pytest.mark.parametrize("part", ["backbone", "llm"])
def test_shipped_weights_were_made_by_the_recipe_in_the_code(part: str) -> None:
    report = json.loads((ASSETS / f"{part}.json").read_text())
    assert report["recipe"] == json.loads(json.dumps(dataclasses.asdict(getattr(AssetsRecipe(), part))))


def test_backbone_loads_in_float32_and_keeps_every_weight() -> None:
    model, info = CLIPVisionModel.from_pretrained(BACKBONE_FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    states = model(torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert states[0].shape[1] == 1 + GRID * GRID


def test_image_processor_prepares_pictures_as_pretraining_did() -> None:
    image = draw_scene(sample_scene(np.random.default_rng(3), "train"))
    processed = AutoImageProcessor.from_pretrained(BACKBONE_FOLDER)(image, return_tensors="pt").pixel_values
    pixels = to_pixels(torch.from_numpy(np.asarray(image)[None].copy()))
    torch.testing.assert_close(processed, pixels, rtol=0, atol=1e-5)


def test_late_layers_of_the_shipped_backbone_read_characters_worse_than_early_ones() -> None:
    measured = json.loads((ASSETS / "backbone.json").read_text())["measured"]
    best = max(layer["character"] for layer in measured)
    assert measured[-2]["character"] < best - 0.1


def test_language_model_answers_scenes_that_are_written_out() -> None:
    right = answer_accuracy(LLM_FOLDER, num_scenes=20, seed=5)
    assert set(right) == set(KINDS)
    assert min(right.values()) >= 0.7 and np.mean(list(right.values())) >= 0.85, right


def test_shipped_tokenizer_is_the_one_that_the_code_builds() -> None:
    shipped, built = AutoTokenizer.from_pretrained(LLM_FOLDER), build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    text = "USER: What does the text say? ASSISTANT: K7P"
    assert shipped(text).input_ids == built(text).input_ids


def test_tokenizer_has_its_control_tokens_and_begins_with_bos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLM_FOLDER)
    control = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
    assert control == ("<s>", "</s>", "<unk>", "<pad>")
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.tokenize("<image>") == ["<image>"]


def test_characters_numbers_and_cell_words_are_single_tokens() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("K7P") == ["K", "7", "P"]
    assert tokenizer.tokenize("[0.25, 1.00]") == ["[", "0.25", ",Ġ", "1.00", "]"]
    assert all(tokenizer.tokenize(word) == [word] for word in CELL_WORDS)


@pytest.mark.parametrize("text", ["Hellö ¿ 你好 </s> [K] 0.123\t\n", "USER: [0.25, 0.50] ASSISTANT: K7P"])
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_a_scene_is_written_with_one_word_a_cell() -> None:
    scene = sample_scene(np.random.default_rng(1), "train")
    words = scene_words(scene)
    assert len(words) == GRID * GRID and set(words) <= set(CELL_WORDS)
    start = scene.text.row * GRID + scene.text.column
    assert words[start : start + 3] == [f"[{character}]" for character in scene.text.string]
    for item in scene.objects:
        assert words.count(f"[{item.color} {item.shape}]") == item.cells**2


def test_cell_words_are_described_in_ordinary_words() -> None:
    assert [cell_description(word) for word in ("[cat]", "[K]", "[red circle]")] == [
        " cat background",
        "K text",
        " red circle object",
    ]


@pytest.mark.parametrize("template", ["plain", "v1", "brief"])
def test_written_scene_stands_where_the_image_will_and_only_answers_are_labelled(template: str) -> None:
    writer = SceneWriter(build_tokenizer())
    scene = sample_scene(np.random.default_rng(2), "train")
    sample = writer.write(scene, [("Describe the image.", caption(scene))], template)
    cells = [writer.cell_ids[word] for word in scene_words(scene)]
    start = sample.input_ids.index(cells[0])
    assert sample.input_ids[start : start + GRID * GRID] == cells
    assert writer.image_token_id not in sample.input_ids
    answered = [label for label in sample.labels if label != IGNORE_INDEX]
    assert writer.tokenizer.decode(answered).strip().removesuffix("</s>") == caption(scene)


def test_places_are_added_to_cell_words_row_by_row_and_to_nothing_else() -> None:
    writer = SceneWriter(build_tokenizer())
    model = tiny_llm(len(writer.tokenizer), hidden_size=16)
    scenes = [sample_scene(np.random.default_rng(seed), "train") for seed in (1, 2)]
    ids = torch.tensor([writer.prompt(scene, "What does the text say?") for scene in scenes])
    cells = torch.tensor(sorted(writer.cell_ids.values()))
    added = embed_written(model, ids, cells) - model.get_input_embeddings()(ids)
    start = int(torch.isin(ids[0], cells).nonzero()[0])
    expected = torch.zeros_like(added)
    expected[:, start : start + GRID * GRID] = place_codes(16)
    torch.testing.assert_close(added, expected)
    assert len(place_codes(16).unique(dim=0)) == GRID * GRID


def test_coarse_words_never_mention_the_string() -> None:
    for seed in range(20):
        scene = sample_scene(np.random.default_rng(seed), "train")
        assert scene.text.string not in coarse_words(scene)
        assert coarse_words(scene)[:2] == [scene.photograph, str(len(scene.objects))]


def test_recipes_write_folders_that_transformers_loads_and_repeat_exactly(tmp_path: Path) -> None:
    for number in ("first", "second"):
        pretrain_backbone(tmp_path / number / "backbone", TINY_BACKBONE)
        pretrain_language_model(tmp_path / number / "llm", TINY_LLM)
    CLIPVisionModel.from_pretrained(tmp_path / "first" / "backbone")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "llm", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for part in ("backbone", "llm"):
        first, second = (load_file(tmp_path / n / part / "model.safetensors") for n in ("first", "second"))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_recipes_leave_threads_and_random_state_as_they_were(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    pretrain_backbone(tmp_path, dataclasses.replace(TINY_BACKBONE, num_threads=1))
    assert torch.get_num_threads() == threads
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_make_assets_writes_recipe_seconds_and_measurements(tmp_path: Path) -> None:
    make_assets(tmp_path, parts=["backbone"], recipe=AssetsRecipe(backbone=TINY_BACKBONE, llm=TINY_LLM))
    report = json.loads((tmp_path / "backbone.json").read_text())
    assert set(report) == {"recipe", "seconds", "measured"}
    assert len(report["measured"]) == 2


def test_make_assets_refuses_an_unknown_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="assets have no part vit; known: backbone, llm"):
        make_assets(tmp_path, parts=["vit"])


def test_answers_are_scored_exactly_and_boxes_by_overlap() -> None:
    box = next(iter(questions_of_kind(sample_scene(np.random.default_rng(0), "train"), "box")))
    assert is_right(f" {box.answer}", box)
    assert not is_right("[0.00, 0.00, 0.01, 0.01]", box)
    assert not is_right("there", box)
    assert not is_right("[0.10, 0.20]", box)
    word = SceneQuestion("color", "What color is the circle?", "red")
    assert is_right(" red", word) and not is_right("reddish", word)


@pytest.mark.parametrize("name", ["llm/model.safetensors", "llm.json"])
def test_a_model_that_was_made_elsewhere_is_left_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path)])
    assert "holds a 'llm' that was not made by `assets`" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]
