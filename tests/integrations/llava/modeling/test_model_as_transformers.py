"""What transformers' own test mixins hold of its LLaVA, held of ours: loading, meta device, attention, signatures."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    pipeline,
)

from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.modeling.generation import end_answers
from integrations.llava.modeling.model import (
    FusedLlavaConfig,
    FusedLlavaForConditionalGeneration,
    FusedLlavaModel,
    LayerfuseVisionConfig,
    LayerfuseVisionModel,
)
from integrations.llava.prompts import TEMPLATES
from layerfuse.fusers import fuser_from_config
from layerfuse.testing import random_images
from tests.integrations.llava.tiny_parts import make_tokenizer

IMAGE_SIZE = (32, 32)


@pytest.fixture(scope="module")
def model(run: Path) -> FusedLlavaForConditionalGeneration:
    return load_model(run)


def batch(model: FusedLlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    image = model.config.image_token_index
    ids = torch.tensor([[1, *[image] * model.config.image_seq_length, 5, 6]])
    return {"input_ids": ids, "pixel_values": random_images(1, size=IMAGE_SIZE)}


def test_auto_model_loads_a_folder_without_its_head(run: Path, model: FusedLlavaForConditionalGeneration) -> None:
    loaded = AutoModel.from_pretrained(run)

    assert type(loaded) is FusedLlavaModel
    with torch.no_grad():
        expected = model.model(**batch(model)).last_hidden_state
        assert torch.equal(loaded(**batch(model)).last_hidden_state, expected)


def test_pipelines_of_features_load_a_folder_and_save_one(run: Path, tmp_path: Path) -> None:
    features = pipeline("feature-extraction", model=str(run))
    found = features("What is this?", return_tensors=True)
    features.save_pretrained(tmp_path)
    again = pipeline("feature-extraction", model=str(tmp_path))

    whole = load_model(run)
    with torch.no_grad():
        expected = whole.model(**features.tokenizer("What is this?", return_tensors="pt")).last_hidden_state
    assert type(features.model) is FusedLlavaModel
    assert torch.equal(found, expected) and torch.equal(again("What is this?", return_tensors=True), expected)
    assert [len(one[0]) for one in features(["a", "What is this?"], batch_size=2)][1] == expected.shape[1]


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForPreTraining])
def test_auto_classes_of_whole_models_load_a_folder(auto: type, run: Path) -> None:
    assert type(auto.from_pretrained(run)) is FusedLlavaForConditionalGeneration  # type: ignore[attr-defined]


def test_misshapen_weights_are_drawn_anew_where_it_is_asked_for(run: Path) -> None:
    config = FusedLlavaConfig.from_pretrained(run)
    config.text_config.vocab_size += 3
    with pytest.raises(ValueError, match=r"mismatched: .*lm_head.weight"):
        FusedLlavaForConditionalGeneration.from_pretrained(run, config=config)
    loaded = FusedLlavaForConditionalGeneration.from_pretrained(run, config=config, ignore_mismatched_sizes=True)

    assert loaded.lm_head.out_features == config.text_config.vocab_size
    assert torch.isfinite(loaded.lm_head.weight).all()


def test_misshapen_weights_of_parts_that_are_kept_are_drawn_as_the_parts_draw_them(run: Path) -> None:
    config = FusedLlavaConfig.from_pretrained(run)
    assert config.fuser is not None and config.vision_config.backbone is not None
    config.fuser["num_points"] = 8
    config.vision_config.backbone["recipe"]["config"]["patch_size"] = 4
    loaded = FusedLlavaForConditionalGeneration.from_pretrained(run, config=config, ignore_mismatched_sizes=True)

    drawn = dict(fuser_from_config(config.fuser).named_parameters())
    same = dict(load_model(run).model.fuser.named_parameters())
    for name, weight in loaded.model.fuser.named_parameters():
        # Offsets and weights of sampling points begin the same at every construction.
        torch.testing.assert_close(weight, same[name] if same[name].shape == weight.shape else drawn[name])
    embedding = next(weight for name, weight in loaded.named_parameters() if "patch_embedding" in name)
    assert embedding.shape[-2:] == (4, 4) and 0.001 < float(embedding.std()) < 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_asked_for_reaches_the_backbone_inside(implementation: str, run: Path) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(run, attn_implementation=implementation)
    inside = [part for part in loaded.modules() if "CLIP" in type(part).__name__ and hasattr(part, "config")]

    assert inside and {part.config._attn_implementation for part in inside} == {implementation}
    other = {"eager": "sdpa", "sdpa": "eager"}[implementation]
    loaded.set_attn_implementation(other)
    assert {part.config._attn_implementation for part in inside} == {other}


def test_a_model_built_on_meta_computes_as_the_saved_one(model: FusedLlavaForConditionalGeneration) -> None:
    with torch.device("meta"):
        empty = FusedLlavaForConditionalGeneration(model.config)
    empty.to_empty(device="cpu")
    for buffer in empty.buffers():
        buffer.fill_(1_000_000)
    for module in empty.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    empty.init_weights()
    empty.load_state_dict(model.state_dict())

    with torch.no_grad():
        torch.testing.assert_close(empty.eval()(**batch(model)).logits, model(**batch(model)).logits)


def test_device_maps_cut_within_no_block_of_backbone_and_fuser(model: FusedLlavaForConditionalGeneration) -> None:
    assert {"CLIPEncoderLayer", "MMFuser", "LlamaDecoderLayer"} <= set(model._no_split_modules)


def test_forward_has_the_arguments_of_transformers_llava() -> None:
    for ours, theirs in (
        (FusedLlavaModel, LlavaModel),
        (FusedLlavaForConditionalGeneration, LlavaForConditionalGeneration),
    ):
        expected = list(inspect.signature(theirs.forward).parameters)
        assert list(inspect.signature(ours.forward).parameters) == expected


def test_forward_takes_arguments_by_place_in_training_too(model: FusedLlavaForConditionalGeneration) -> None:
    given = batch(model)
    text = torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        expected = model.model(**given).last_hidden_state
        assert torch.equal(model.model(given["input_ids"], given["pixel_values"])[0], expected)
        expected = model.model(input_ids=text).last_hidden_state
    model.train()
    found = model.model(text, None, torch.ones_like(text))[0]
    model.eval()
    torch.testing.assert_close(found, expected)


def test_image_features_come_as_a_tuple_on_request(model: FusedLlavaForConditionalGeneration) -> None:
    pixels = random_images(2, size=IMAGE_SIZE)
    features = model.get_image_features(pixels)
    fused, projected = model.get_image_features(pixels, return_dict=False)

    assert torch.equal(fused, features.last_hidden_state)
    assert all(torch.equal(one, other) for one, other in zip(projected, features.pooler_output, strict=True))


def test_configs_without_content_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="describes no backbone or no fuser; set vision_config"):
        FusedLlavaForConditionalGeneration(FusedLlavaConfig())
    with pytest.raises(ValueError, match="describes no backbone; set backbone="):
        LayerfuseVisionModel(LayerfuseVisionConfig())


def test_plain_generate_of_a_trained_run_ends_where_training_taught(run_folder: Path) -> None:
    loaded = load_model(run_folder)
    end = make_tokenizer("llama").eos_token_id
    assert loaded.generation_config.eos_token_id == end
    assert loaded.generation_config.suppress_tokens == [loaded.config.image_token_index]


def test_answers_end_where_training_taught_and_where_they_ended_before(
    model: FusedLlavaForConditionalGeneration,
) -> None:
    tokenizer = make_tokenizer("llama")
    config = model.generation_config
    for known, template, expected in (
        (None, "v1", 2),
        (7, "v1", [2, 7]),
        ([7, 2], "v1", [2, 7]),
        (7, "plain", [tokenizer.convert_tokens_to_ids("<0x0A>"), 7]),
    ):
        config.eos_token_id = known
        end_answers(config, tokenizer, TEMPLATES[template])
        assert config.eos_token_id == expected
    end = model(**batch(model)).logits[0, -1].argmax().item()
    config.eos_token_id = end
    ids = model.generate(**batch(model), max_new_tokens=9, do_sample=False)
    assert ids.shape[1] == batch(model)["input_ids"].shape[1] + 1 and ids[0, -1] == end


def test_the_backbone_inside_is_transformers_own(model: FusedLlavaForConditionalGeneration) -> None:
    assert any(isinstance(part, CLIPVisionModel) for part in model.model.vision_tower.modules())
