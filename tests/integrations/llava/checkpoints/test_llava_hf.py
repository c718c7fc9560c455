"""transformers' LLaVA becomes ours and goes back; ours, wherever it comes from, becomes one of transformers'."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from integrations.llava.checkpoints import Options, convert, layout_of
from integrations.llava.checkpoints.model_io import load_model, load_processor
from integrations.llava.checkpoints.tensors import stored_model
from integrations.llava.image_layout import ImageLayout, ImageSize
from tests.integrations.llava.checkpoints.foreign import logits_of, save_llava_hf, tiny_llava_hf
from tests.integrations.llava.tiny_parts import make_tokenizer


@pytest.mark.parametrize("keys", ["saved", "hub", "new"])
def test_any_layout_of_keys_computes_the_same_and_goes_back(
    keys: str, llava_hf_model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_llava_hf(llava_hf_model, source, keys=keys)
    image_token = llava_hf_model.config.image_token_index
    ours = convert(source, tmp_path / "ours")
    expected = logits_of(llava_hf_model, image_token)
    torch.testing.assert_close(logits_of(load_model(ours), image_token), expected, atol=1e-5, rtol=0)

    back = convert(ours, tmp_path / "back", "llava-hf")
    assert layout_of(back) == "llava-hf"
    loaded, report = LlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    for name, tensor in llava_hf_model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_written_keys_are_those_of_the_checkpoints_on_the_hub(llava_hf_folder: Path, tmp_path: Path) -> None:
    back = convert(convert(llava_hf_folder, tmp_path / "ours"), tmp_path / "back", "llava-hf")
    names = set(stored_model(back))
    assert {
        "language_model.lm_head.weight",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "vision_tower.vision_model.encoder.layers.5.mlp.fc1.bias",
        "multi_modal_projector.linear_2.bias",
    } <= names


def test_a_tower_without_class_token_is_taken_whole(tmp_path: Path) -> None:
    vocabulary = len(make_tokenizer("llama"))
    model = tiny_llava_hf(vocabulary=vocabulary + 2, image_token=vocabulary, tower="siglip")
    save_llava_hf(model, tmp_path / "source")
    ours = convert(tmp_path / "source", tmp_path / "ours")
    expected = logits_of(model, vocabulary)
    torch.testing.assert_close(logits_of(load_model(ours), vocabulary), expected, atol=1e-5, rtol=0)
    back = LlavaForConditionalGeneration.from_pretrained(convert(ours, tmp_path / "back", "llava-hf"))
    torch.testing.assert_close(logits_of(back, vocabulary), expected, atol=1e-5, rtol=0)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    vocabulary = len(make_tokenizer("llama"))
    model = tiny_llava_hf(vocabulary=vocabulary + 2, image_token=vocabulary, tie_word_embeddings=True)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    save_llava_hf(model, tmp_path / "source")
    assert not any("lm_head" in name for name in stored_model(tmp_path / "source"))
    ours = load_model(convert(tmp_path / "source", tmp_path / "ours"))
    torch.testing.assert_close(logits_of(ours, vocabulary), logits_of(model, vocabulary), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad", [True, False], ids=["pad", "crop"])
def test_images_are_prepared_as_the_checkpoint_says(
    pad: bool, llava_hf_model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    save_llava_hf(llava_hf_model, tmp_path / "source", pad=pad)
    ours = convert(tmp_path / "source", tmp_path / "ours")
    assert load_processor(ours).image_processor.preprocessing["mode"] == ("pad" if pad else "crop")


def test_images_that_are_prepared_in_another_way_stay_so(llava_hf_folder: Path, tmp_path: Path) -> None:
    ours = convert(llava_hf_folder, tmp_path / "ours", options=Options(image_mode="pad"))
    back = convert(ours, tmp_path / "back", "llava-hf")
    assert json.loads((llava_hf_folder / "preprocessor_config.json").read_text())["do_pad"] is False
    assert json.loads((back / "preprocessor_config.json").read_text())["do_pad"] is True
    assert load_processor(convert(back, tmp_path / "again")).image_processor.preprocessing["mode"] == "pad"


# From a published checkpoint, where neither processor nor rows for `<image>` exist


@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
def test_a_published_baseline_becomes_one_of_transformers(mode: Any, llava_folder: Path, tmp_path: Path) -> None:
    ours = convert(llava_folder, tmp_path / "ours", options=Options(image_mode=mode))
    theirs = convert(ours, tmp_path / "theirs", "llava-hf")
    model, other = load_model(ours), LlavaForConditionalGeneration.from_pretrained(theirs)
    image_token = model.config.image_token_index
    torch.testing.assert_close(logits_of(other, image_token), logits_of(model, image_token), atol=1e-5, rtol=0)
    assert other.generation_config.suppress_tokens == [image_token]

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8))
    prompt = "USER: <image>\nWhat? ASSISTANT:"
    processor = AutoProcessor.from_pretrained(theirs, backend="pil")
    batch = processor(images=image, text=prompt, return_tensors="pt")
    expected = load_processor(ours)(images=image, text=prompt, return_tensors="pt")
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)
    answer = other.generate(**batch, max_new_tokens=3, do_sample=False)
    assert image_token not in answer[0, batch["input_ids"].shape[1] :]


def test_one_of_transformers_becomes_a_published_baseline(llava_hf_folder: Path, tmp_path: Path) -> None:
    ours = convert(llava_hf_folder, tmp_path / "ours")
    published = convert(ours, tmp_path / "published", "llava", options=Options(vision_tower="openai/clip-vit"))
    config = json.loads((published / "config.json").read_text())
    vocabulary = len(make_tokenizer("llama"))
    # `<image>`, `<pad>` and the rows that fill up are no part of the language model.
    assert config["vocab_size"] == vocabulary
    assert stored_model(published)["lm_head.weight"].shape[0] == vocabulary
    assert not any("vision_tower" in name for name in stored_model(published))
    text = "".join((published / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json"))
    assert "<image>" not in text and "<pad>" not in text
    again = convert(published, tmp_path / "again", options=Options(vision_tower=str(llava_hf_folder)))
    image_token = load_model(ours).config.image_token_index
    expected = logits_of(load_model(ours), image_token)[..., :vocabulary]
    torch.testing.assert_close(logits_of(load_model(again), vocabulary), expected, atol=1e-5, rtol=0)


def test_tokens_by_size_have_no_place_in_other_layouts(llava_hf_folder: Path, tmp_path: Path) -> None:
    class AnyLayout(ImageLayout):
        name = "any of a test"

        def num_tokens(self, image_size: ImageSize | None = None) -> int:
            return 16

    ours = convert(llava_hf_folder, tmp_path / "ours")
    for name in ("config.json", "processor_config.json"):
        text = (ours / name).read_text()
        described = re.sub(r'"image_layout": \{[^}]*\}', '"image_layout": {"name": "any of a test"}', text)
        assert described != text
        (ours / name).write_text(described)
    for layout in ("llava-hf", "llava", "mmfuser"):
        with pytest.raises(
            ValueError, match=f"image layout 'any of a test'.* {layout!r} has one number for all images"
        ):
            convert(ours, tmp_path / "theirs", layout)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-3, -2]}, r"vision_feature_layer is \[-3, -2\], expected one layer"),
        ({"vision_feature_select_strategy": "full"}, "select_strategy is 'full', expected 'default'"),
        ({"projector_hidden_act": "relu"}, "the projector is not linear, GELU, linear with biases"),
        ({"multimodal_projector_bias": False}, "the projector is not linear, GELU, linear with biases"),
        ({"image_token_index": 3}, "image_token_index is 3, but the tokenizer's <image> is"),
    ],
)
def test_other_models_of_transformers_are_refused(
    changes: dict[str, Any], message: str, llava_hf_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llava_hf_folder, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target")
