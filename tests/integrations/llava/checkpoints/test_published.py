"""Published MMFuser and LLaVA-1.5 checkpoints become ours and go back as they came."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from integrations.llava.checkpoints import Options, convert, layout_of
from integrations.llava.checkpoints.model_io import load_model, load_processor
from integrations.llava.checkpoints.tensors import stored_model
from tests.integrations.llava.checkpoints.foreign import FUSED_LAYERS, save_published, tiny_llava_hf
from tests.integrations.llava.tiny_parts import make_tokenizer

IMAGE_TOKENS = 16


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in stored_model(folder).items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert sorted(first) == sorted(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize("kind", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize(("fused", "layout"), [(True, "mmfuser"), (False, "llava")])
@pytest.mark.parametrize("tower", [True, False], ids=["with vision model", "without vision model"])
def test_a_published_checkpoint_goes_back_as_it_came(
    kind: str, fused: bool, layout: str, tower: bool, published_llm: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    source = tmp_path / "a name that tells nothing"
    weights = save_published(published_llm, source, fused=fused, tower=tower, kind=kind)
    assert layout_of(source) == layout
    ours = convert(source, tmp_path / "ours")
    back = convert(ours, tmp_path / "back", layout)

    assert layout_of(ours) == "layerfuse"
    assert_same(weights_of(back), weights)
    was, now = config_of(source), config_of(back)
    assert {key: now[key] for key in was} == was
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_a_converted_baseline_computes_what_transformers_llava_computes(
    llava_folder: Path, published_llm: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    model = load_model(convert(llava_folder, tmp_path / "ours"))
    vocabulary = published_llm.config.get_text_config().vocab_size
    ids = torch.tensor([[1, 5, *[vocabulary] * IMAGE_TOKENS, 7, 8, 9]])
    pixels = torch.randn(1, 3, 32, 32)
    # There, the image takes the place of an ordinary token, since the vocabulary has no other.
    theirs = torch.where(ids == vocabulary, published_llm.config.image_token_index, ids)
    with torch.no_grad():
        expected = published_llm(input_ids=theirs, pixel_values=pixels).logits
        logits = model(input_ids=ids, pixel_values=pixels).logits

    assert model.config.image_token_index == vocabulary == logits.shape[-1] - 1
    torch.testing.assert_close(logits[..., :-1], expected, atol=1e-5, rtol=0)


def test_a_converted_model_has_prompts_pixels_and_layers_of_the_published_config(
    mmfuser_folder: Path, tmp_path: Path
) -> None:
    ours = convert(mmfuser_folder, tmp_path / "ours")
    model, processor = load_model(ours), load_processor(ours)
    backbone = model.model.vision_tower.backbone
    assert backbone.family == "transformers"
    assert [layer - backbone.num_blocks - 1 for layer in backbone.layers] == FUSED_LAYERS
    assert processor.image_processor.preprocessing["mode"] == "pad"
    assert model.config.prompt_template["name"] == "v1"
    assert model.generation_config.eos_token_id == 2 and model.generation_config.max_length != 77
    loaded = AutoModelForImageTextToText.from_pretrained(ours)
    assert_same(dict(model.state_dict()), dict(loaded.state_dict()))


def test_template_and_image_mode_are_taken_from_the_options(mmfuser_folder: Path, tmp_path: Path) -> None:
    ours = convert(mmfuser_folder, tmp_path / "ours", options=Options(template="brief", image_mode="crop"))
    assert load_model(ours).config.prompt_template["name"] == "brief"
    assert load_processor(ours).image_processor.preprocessing["mode"] == "crop"
    again = convert(ours, tmp_path / "again", options=Options(template="v1", image_mode="pad"))
    assert load_model(again).config.prompt_template["name"] == "v1"
    assert load_processor(again).image_processor.preprocessing["mode"] == "pad"


def test_without_aspect_ratio_images_are_cropped_as_in_the_published_code(mmfuser_folder: Path, tmp_path: Path) -> None:
    source = change_config(mmfuser_folder, tmp_path, image_aspect_ratio=None)
    ours = convert(source, tmp_path / "ours", options=Options(vision_tower=str(mmfuser_folder.parent / "tiny-clip")))
    assert load_processor(ours).image_processor.preprocessing["mode"] == "crop"


def change_config(source: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy whose config differs; the weights are the same files."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    content = config_of(source) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_stay_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tmp_path / "half"
    save_published(tiny_llava_hf(vocabulary=300, image_token=299).to(dtype), source)
    ours = convert(source, tmp_path / "ours")
    back = convert(ours, tmp_path / "back", "mmfuser")
    assert_same(weights_of(back), weights_of(source))
    name = str(dtype).removeprefix("torch.")
    assert config_of(ours)["dtype"] == config_of(back)["torch_dtype"] == name
    assert AutoModelForImageTextToText.from_pretrained(ours).dtype == dtype


def test_scaled_rotary_embeddings_survive_both_ways(mmfuser_folder: Path, tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    source = change_config(mmfuser_folder, tmp_path, rope_scaling=scaling, rope_theta=5000.0)
    options = Options(vision_tower=str(mmfuser_folder.parent / "tiny-clip"))
    ours = convert(source, tmp_path / "ours", options=options)
    rope = load_model(ours).config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 5000.0)
    back = config_of(convert(ours, tmp_path / "back", "mmfuser"))
    assert (back["rope_scaling"], back["rope_theta"]) == (scaling, 5000.0)


def test_of_six_selected_layers_the_fifth_is_ignored_as_in_the_published_code(
    mmfuser_folder: Path, tmp_path: Path
) -> None:
    source = change_config(mmfuser_folder, tmp_path, mm_vision_select_layer=[-7, -6, -5, -4, -3, -2])
    options = Options(vision_tower=str(mmfuser_folder.parent / "tiny-clip"))
    model = load_model(convert(source, tmp_path / "ours", options=options))
    assert model.model.vision_tower.backbone.layers == (0, 1, 2, 3, 5)


def test_an_mmfuser_is_written_in_shards_where_the_published_code_looks_for_the_scales(
    mmfuser_folder: Path, tmp_path: Path
) -> None:
    back = convert(convert(mmfuser_folder, tmp_path / "ours"), tmp_path / "back", "mmfuser")
    places = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    assert {*places.values()} == {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    for scale in ("gamma1", "gamma2"):
        assert places[f"model.mm_projector.0.{scale}"] == "model-00003-of-00003.safetensors"


def test_tables_that_old_versions_stored_are_left_out(
    published_llm: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    source = tmp_path / "old"
    weights = save_published(published_llm, source)
    from tests.integrations.llava.checkpoints.foreign import write_weights

    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    write_weights(weights | tables, source)
    back = convert(convert(source, tmp_path / "ours"), tmp_path / "back", "mmfuser")
    assert_same(weights_of(back), weights)


def test_a_converted_model_stops_at_the_end_that_training_taught(mmfuser_folder: Path, tmp_path: Path) -> None:
    """With plain `generate`, also where the language model's config names another end."""
    source = tmp_path / "copy" / mmfuser_folder.name
    shutil.copytree(mmfuser_folder.parent, tmp_path / "copy")
    prompt = torch.arange(10, 20)[None]
    first = convert(source, tmp_path / "first")
    longest = load_model(first).generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, 10:].tolist()
    end = next(token for token in longest[1:] if token != longest[0])
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["eos_token"] = load_processor(first).tokenizer.convert_ids_to_tokens(end)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))

    model = load_model(convert(source, tmp_path / "second"))
    answer = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 10:].tolist()
    assert answer == longest[: longest.index(end) + 1]
    other = json.loads((source / "config.json").read_text())["eos_token_id"]
    assert model.generation_config.eos_token_id == [end, other]


def test_a_converted_model_ends_answers_as_a_trained_one_does(mmfuser_folder: Path, tmp_path: Path) -> None:
    newline = make_tokenizer("llama").convert_tokens_to_ids("<0x0A>")
    for template, ends in (("v1", 2), ("plain", [newline, 2])):
        ours = convert(mmfuser_folder, tmp_path / template, options=Options(template=template))
        stored = json.loads((ours / "generation_config.json").read_text())
        assert (stored["eos_token_id"], stored["pad_token_id"]) == (ends, 0)
