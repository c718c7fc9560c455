"""Language models whose logits are more than a product: kept by our own layout, refused by those that cannot say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PreTrainedConfig,
)

from integrations.llava.checkpoints import Options, convert
from integrations.llava.checkpoints.model_io import load_model, save_model
from integrations.llava.modeling.build import build_model
from integrations.llava.modeling.processing import add_image_token, build_processor
from integrations.llava.prompts import get_template
from layerfuse.backbones import TransformersBackbone
from layerfuse.errors import InputError
from layerfuse.fusers import create_fuser
from tests.integrations.llava.checkpoints.foreign import logits_of, save_llava_hf
from tests.integrations.llava.tiny_parts import make_tokenizer, tiny_clip

IMAGE_TOKEN = len(make_tokenizer("llama"))
TINY = {
    "vocab_size": IMAGE_TOKEN + 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
HEADS = {
    "bias": PhiConfig(**TINY),
    "cap": Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=0.7),
    "scale": GraniteConfig(**TINY, logits_scaling=8.0),
}
WORDS = {
    "bias": "adds a bias to its logits",
    "cap": "soft-caps its logits at 0.7",
    "scale": "multiplies its logits with 0.125",
}


def save_ours(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if getattr(llm.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(llm.get_output_embeddings().bias)
    tokenizer, template = make_tokenizer("llama"), get_template("v1")
    backbone = TransformersBackbone(tiny_clip(num_hidden_layers=3), layers=(2,))
    fuser = create_fuser("select", in_channels=32, num_layers=1)
    image_token = add_image_token(tokenizer)
    model = build_model(backbone, fuser, llm, image_token_id=image_token, prompt_template=template.to_dict())
    return save_model(model, build_processor(model, tokenizer, backbone.preprocessing, template), folder)


def assert_same_logits(one: Any, other: Any) -> None:
    torch.testing.assert_close(logits_of(one, IMAGE_TOKEN), logits_of(other, IMAGE_TOKEN), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", HEADS)
def test_our_own_layout_keeps_the_head(kind: str, tmp_path: Path) -> None:
    ours = save_ours(HEADS[kind], tmp_path / "ours")

    again = convert(ours, tmp_path / "again")

    assert load_model(again).config.head == load_model(ours).config.head is not None
    assert_same_logits(load_model(again), load_model(ours))


def test_a_head_that_0_1_wrote_as_a_product_stays_one(tmp_path: Path) -> None:
    """Its projector was trained so, whatever the language model does where it stands alone."""
    ours = save_ours(HEADS["scale"], tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"head": None}))

    again = convert(ours, tmp_path / "again")

    assert load_model(again).config.head is None
    assert_same_logits(load_model(again), load_model(ours))


def test_an_embedding_of_another_name_is_converted(tmp_path: Path) -> None:
    ours = save_ours(GPT2Config(vocab_size=IMAGE_TOKEN + 2, n_embd=32, n_layer=2, n_head=2), tmp_path / "ours")

    assert_same_logits(load_model(convert(ours, tmp_path / "again")), load_model(ours))


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_a_layout_cannot_say_is_refused_with_the_way_out(kind: str, tmp_path: Path) -> None:
    ours = save_ours(HEADS[kind], tmp_path / "ours")
    way_out = "Keep the layout 'layerfuse', which holds this model as it is"

    with pytest.raises(InputError, match=f"the language model {WORDS[kind]}; transformers' LLaVA only .* {way_out}"):
        convert(ours, tmp_path / "hf", "llava-hf")
    with pytest.raises(InputError, match=f"{WORDS[kind]}; the published code has only plain Llamas. {way_out}"):
        convert(ours, tmp_path / "llava", "llava", options=Options(vision_tower="no/clip"))
    assert not (tmp_path / "hf").exists() and not (tmp_path / "llava").exists()


@pytest.mark.parametrize("kind", ["cap", "scale"])
def test_a_llava_of_transformers_is_a_product_whatever_its_language_model_is(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        text_config=HEADS[kind],
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.set_attn_implementation("eager")
    save_llava_hf(theirs, tmp_path / "theirs")

    ours = convert(tmp_path / "theirs", tmp_path / "ours")
    back = convert(ours, tmp_path / "back", "llava-hf")

    assert_same_logits(load_model(ours), theirs)
    assert_same_logits(LlavaForConditionalGeneration.from_pretrained(back, attn_implementation="eager"), theirs)
