"""A model that was trained here, around timm's CLIP, becomes one of the published code or of transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from integrations.llava.checkpoints import Options, convert
from integrations.llava.checkpoints.model_io import load_model, save_model
from integrations.llava.checkpoints.tensors import stored_model
from integrations.llava.modeling.build import build_model
from integrations.llava.modeling.processing import add_image_token, build_processor
from integrations.llava.prompts import get_template
from layerfuse.backbones import create_backbone
from layerfuse.fusers import create_fuser
from layerfuse.testing import randomise_parameters
from tests.integrations.llava.checkpoints.foreign import logits_of, save_tower
from tests.integrations.llava.tiny_parts import make_tokenizer

TIMM_CLIP = "vit_base_patch16_clip_quickgelu_224"
TINY = {"embed_dim": 32, "depth": 6, "num_heads": 2, "mlp_ratio": 1.5, "patch_size": 8}


def timm_names(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' CLIP as timm holds it, up to the fifth block; written down independently of the code under test."""
    weights = {
        "cls_token": given["embeddings.class_embedding"][None, None],
        "pos_embed": given["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": given["embeddings.patch_embedding.weight"],
    }
    pairs = {"norm_pre": "pre_layrnorm"}
    for block in range(5):
        theirs = f"encoder.layers.{block}"
        pairs |= {f"blocks.{block}.norm{number}": f"{theirs}.layer_norm{number}" for number in (1, 2)}
        pairs |= {f"blocks.{block}.mlp.fc{number}": f"{theirs}.mlp.fc{number}" for number in (1, 2)}
        pairs[f"blocks.{block}.attn.proj"] = f"{theirs}.self_attn.out_proj"
        for kind in ("weight", "bias"):
            qkv = [given[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(qkv)
    return weights | {
        f"{ours}.{kind}": given[f"{name}.{kind}"] for ours, name in pairs.items() for kind in ("weight", "bias")
    }


def save_run(
    model: LlavaForConditionalGeneration,
    folder: Path,
    *,
    fuser: str = "select",
    layers: tuple[int, ...] = (-2,),
    name: str = TIMM_CLIP,
) -> Path:
    """Save a model as training leaves it: timm's backbone, nothing of another layout."""
    backbone = create_backbone(f"timm:{name}", layers=layers, pretrained=False, image_size=32, options=TINY)
    if name == TIMM_CLIP:
        backbone.model.load_state_dict(timm_names(dict(model.model.vision_tower.state_dict())))
    # A model grows its config's vocabulary along with its own.
    llm = LlamaForCausalLM(copy.deepcopy(model.config.get_text_config()))
    weights = {name.replace("model.language_model.", "model."): tensor for name, tensor in model.state_dict().items()}
    llm.load_state_dict(weights, strict=False)
    tokenizer, template = make_tokenizer("llama"), get_template("v1")
    ours = build_model(
        backbone,
        randomise_parameters(create_fuser(fuser, in_channels=32, num_layers=len(layers))),
        llm,
        image_token_id=add_image_token(tokenizer),
        prompt_template=template.to_dict(),
    )
    return save_model(ours, build_processor(ours, tokenizer, backbone.preprocessing, template), folder)


def test_a_baseline_becomes_one_of_transformers_with_the_rest_of_its_tower(
    published_llm: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    run = save_run(published_llm, tmp_path / "run")
    tower = save_tower(published_llm, tmp_path / "tower-clip")
    options = Options(vision_tower=str(tower))
    theirs = LlavaForConditionalGeneration.from_pretrained(convert(run, tmp_path / "hf", "llava-hf", options=options))
    model = load_model(run)
    image_token = model.config.image_token_index
    torch.testing.assert_close(logits_of(theirs, image_token), logits_of(model, image_token), atol=1e-5, rtol=0)


def test_a_baseline_becomes_a_published_one_that_names_its_tower(
    published_llm: LlavaForConditionalGeneration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = save_run(published_llm, tmp_path / "run")
    tower = save_tower(published_llm, tmp_path / "tower-clip")
    published = convert(run, tmp_path / "published", "llava", options=Options(vision_tower=str(tower)))
    config = json.loads((published / "config.json").read_text())
    assert (config["mm_vision_tower"], config["mm_vision_select_layer"]) == (str(tower), -2)
    assert config["vocab_size"] == len(make_tokenizer("llama"))
    assert "tokenizer.model, which the published code needs" in caplog.text
    again, model = load_model(convert(published, tmp_path / "again")), load_model(run)
    image_token = model.config.image_token_index
    torch.testing.assert_close(logits_of(again, image_token), logits_of(model, image_token), atol=1e-5, rtol=0)


def test_an_mmfuser_becomes_a_published_one(published_llm: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    run = save_run(published_llm, tmp_path / "run", fuser="mmfuser", layers=(1, 2, 3, 4, 5))
    tower = save_tower(published_llm, tmp_path / "tower-clip")
    published = convert(run, tmp_path / "published", "mmfuser", options=Options(vision_tower=str(tower)))
    assert "model.mm_projector.0.gamma1" in stored_model(published)
    again, model = load_model(convert(published, tmp_path / "again")), load_model(run)
    image_token = model.config.image_token_index
    torch.testing.assert_close(logits_of(again, image_token), logits_of(model, image_token), atol=1e-5, rtol=0)


def test_without_origin_the_tower_has_to_be_named(published_llm: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    run = save_run(published_llm, tmp_path / "run")
    with pytest.raises(ValueError, match="vision model is called None; .* --vision-tower openai/clip"):
        convert(run, tmp_path / "published", "llava")
    with pytest.raises(ValueError, match="holds the whole vision model, but ours ends at its deepest tapped layer"):
        convert(run, tmp_path / "hf", "llava-hf")


def test_a_tower_that_is_no_clip_has_no_place_elsewhere(
    published_llm: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    run = save_run(published_llm, tmp_path / "run", name="vit_base_patch16_224")
    with pytest.raises(ValueError, match="is timm's 'vit_base_patch16_224', which is no CLIP vision transformer"):
        convert(run, tmp_path / "hf", "llava-hf", options=Options(vision_tower="openai/clip"))
