"""Every causal language model of transformers that can be built tiny: its text logits inside our model are its own.

Or it is refused by name when the model is built.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from integrations.llava.assembly import described_llm, llm_from_config
from integrations.llava.checkpoint import load_model
from integrations.llava.config import ModelConfig
from integrations.llava.model import FusedLlavaForConditionalGeneration, build_model
from layerfuse.backbones import create_backbone
from layerfuse.errors import InputError
from layerfuse.fusers import create_fuser

VOCABULARY = 61
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# Other names of the same sizes; a config takes those that it has.
OTHER = {
    **TINY,
    **dict.fromkeys(("n_layer", "n_head", "num_layers", "num_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("n_embd", "d_model"), 32),
    **dict.fromkeys(("n_inner", "d_ff", "ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("head_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.tensor([[3, 4, 5, 6, 7]])
MOST_PARAMETERS = 1_100_000
# Types of transformers 5.24 that are computed right, and that are tried at all; fewer means that the trial broke.
FEWEST_RIGHT, FEWEST_TRIED = 60, 80


def whole(llm: PreTrainedModel) -> FusedLlavaForConditionalGeneration:
    backbone = create_backbone(
        "timm",
        "vit_base_patch16_clip_quickgelu_224",
        layers=(1, 2),
        pretrained=False,
        image_size=32,
        options={"embed_dim": 32, "depth": 2, "num_heads": 2},
    )
    fuser = create_fuser("average", in_channels=32, num_layers=2)
    return build_model(backbone, fuser, llm, image_token_id=VOCABULARY - 1).eval()


def tiny_causal(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in llm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return llm  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY),
        LlamaConfig(**TINY, tie_word_embeddings=True),
        PhiConfig(**TINY),
        Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=0.7),
        GraniteConfig(**TINY, logits_scaling=8.0),
        CohereConfig(**TINY, logit_scale=0.3),
    ],
    ids=["product", "tied", "bias", "soft cap", "divided", "multiplied"],
)
def test_heads_that_do_more_than_a_product_give_their_own_logits(config: PreTrainedConfig, tmp_path: Any) -> None:
    llm = tiny_causal(config)
    if getattr(llm.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(llm.get_output_embeddings().bias)
    with torch.no_grad():
        expected = llm(IDS).logits
        model = whole(llm)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(load_model(tmp_path)(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
        model.resize_token_embeddings(VOCABULARY + 3)
        resized = model(input_ids=IDS).logits[..., :VOCABULARY]
        torch.testing.assert_close(resized, expected, atol=1e-5, rtol=1e-5)


def test_a_language_model_of_another_make_is_refused_by_name() -> None:
    class Odd(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden).square()

    llm = tiny_causal(LlamaConfig(**TINY))
    odd = Odd(32, VOCABULARY, bias=False)
    llm.set_output_embeddings(odd)

    with pytest.raises(InputError, match=r"type 'llama' \(LlamaForCausalLM\) cannot be used: its logits are not"):
        whole(llm)


def described(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The config of a type with every size that it has made small."""
    config = kind()
    for name, value in OTHER.items():
        if isinstance(getattr(config, name, ""), (int, type(None))) and not isinstance(getattr(config, name), bool):
            setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None):
            setattr(config, name, list(getattr(config, name))[:2])
    return config


def own_logits(kind: type[PreTrainedConfig]) -> tuple[PreTrainedModel, torch.Tensor]:
    """A tiny language model of a type, and its logits; transformers raises what it likes where there is none."""
    config = described(kind)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(deepcopy(config)).num_parameters()
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    llm = tiny_causal(config)
    with torch.no_grad():
        return llm, llm(IDS).logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_causal_type_that_can_be_built_tiny_gives_its_own_logits_or_is_refused() -> None:
    right, refused, untried, wrong = [], {}, {}, {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        name = kind.model_type
        try:
            llm, expected = own_logits(kind)
        except (AttributeError, AssertionError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            untried[name] = f"{type(error).__name__}: {error}"[:120]
            continue
        try:
            model = whole(llm)
        except InputError as error:
            assert repr(name) in str(error)
            refused[name] = str(error)
            continue
        with torch.no_grad():
            difference = float((model(input_ids=IDS).logits - expected).abs().max())
        right.append(name)
        if difference > 1e-4 * max(1.0, float(expected.abs().max())):
            wrong[name] = difference
    print(f"right: {right}\nrefused: {refused}\nuntried: {untried}")

    assert wrong == {}
    assert len(right) >= FEWEST_RIGHT and len(right) + len(refused) >= FEWEST_TRIED
    assert {"llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "granite", "cohere"} <= set(right)


def test_a_language_model_without_the_attention_asked_for_names_the_way_out() -> None:
    llm = {"model_type": "gemma2", **TINY, "head_dim": 16}
    config = ModelConfig(llm="none", llm_pretrained=False, llm_architecture=llm)

    with pytest.raises(InputError, match=r"scaled_dot_product_attention yet.* Try `--model.attention eager`"):
        llm_from_config(config, described_llm(config), dtype=torch.float32)
