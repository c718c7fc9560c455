"""Every causal language model of transformers that can be built tiny: its text logits inside our model are its own.

Or it is refused by name when the model is built.
"""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    GraniteConfig,
    LlamaConfig,
    MBartConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.config.schema import ModelConfig
from integrations.llava.modeling.build import _language_model, build_model, build_recipe_model, read_language_files
from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration
from integrations.llava.modeling.packing import check_packing
from layerfuse.backbones import create_backbone
from layerfuse.errors import InputError
from layerfuse.fusers import create_fuser
from tests.integrations.llava.tiny_parts import save_llm

VOCABULARY = 61
GREEDY: dict[str, Any] = {
    "max_new_tokens": 4,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "suppress_tokens": [VOCABULARY - 1],
}
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
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("attention_hidden_size", "embedding_size"), 32),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "topk_group", "n_group"), 2),
    "vocab_size_per_layer_input": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a type needs beside: sizes under names of its own, and counts that follow from others.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "dots1": {"n_shared_experts": 1},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "roc_bert": {"pronunciation_vocab_size": 61, "shape_vocab_size": 61},
    **{name: {"head_dim": 8} for name in ("deepseek_v3", "axk1", "bailing_hybrid", "sarvam_mla", "youtu")},
}
NOT_BUILT = (
    *(AttributeError, AssertionError, IndexError, KeyError, TypeError, ValueError, RuntimeError),
    StrictDataclassError,
)
IDS = torch.tensor([[3, 4, 5, 6, 7]])
MOST_PARAMETERS = 10_000_000
# Shares of all types: with transformers 5.24, of 196, 123 are computed right and 47 refused; fewer means that the trial
# broke. The 26 others have sizes that are fixed or constrain one another (prophetnet, qwen4_exp, xlstm, longcat_flash,
# dory, blt, lfm2_moe), a size for each layer (gemma4 and its kin, dots3_note), blocks in an order of their own (zamba,
# zamba2, cohere_compass_text), a part that has to be set up first (reformer, xmod), or a config that does not fit
# its class (dbrx, musicgen, xlnet).
FEWEST_RIGHT, FEWEST_TRIED = 0.55, 0.8


def whole(llm: PreTrainedModel) -> FusedLlavaForConditionalGeneration:
    backbone = create_backbone(
        "timm:vit_base_patch16_clip_quickgelu_224",
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
        OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=32),  # calls a part of what AutoModel builds
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2),  # refuses set_attn_implementation
    ],
    ids=["product", "tied", "bias", "soft cap", "divided", "multiplied", "part of a decoder", "attention of its own"],
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


def test_a_head_that_was_resized_is_not_drawn_anew() -> None:
    model = whole(tiny_causal(GraniteConfig(**TINY, logits_scaling=8.0)))
    model.resize_token_embeddings(VOCABULARY + 3)
    before = model.lm_head.weight.clone()
    model.post_init()

    assert torch.equal(model.lm_head.weight, before)


def test_a_language_model_of_another_make_is_refused_by_name() -> None:
    class Odd(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden).square()

    llm = tiny_causal(LlamaConfig(**TINY))
    odd = Odd(32, VOCABULARY, bias=False)
    llm.set_output_embeddings(odd)

    with pytest.raises(InputError, match=r"type 'llama' \(LlamaForCausalLM\) cannot be used: its logits are not"):
        whole(llm)


def test_a_language_model_that_could_not_be_loaded_again_is_refused_by_name() -> None:
    llm = tiny_causal(MBartConfig(**TINY, d_model=32, decoder_ffn_dim=48, decoder_layers=2, decoder_attention_heads=2))

    with pytest.raises(InputError, match=r"type 'mbart' .* AutoModel builds no decoder like its own, so that what is"):
        whole(llm)


def test_a_language_model_without_a_cache_of_transformers_is_refused_by_name() -> None:
    llm = tiny_causal(OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2))

    with pytest.raises(InputError, match=r"type 'openai-gpt' .* takes no cache of transformers', with which"):
        whole(llm)


def test_a_model_of_several_parts_is_refused_by_name() -> None:
    llm = tiny_causal(shrunk(Gemma3Config()))

    with pytest.raises(InputError, match=r"type 'gemma3' .* its config has no hidden_size.*; take its text model"):
        whole(llm)


def sizes_of(config: PreTrainedConfig) -> dict[str, int]:
    """The tiny sizes under the names that a config has."""
    sizes = {}
    for name, size in OTHER.items():
        with suppress(AttributeError):  # it has none of that name, or one for each layer
            value = getattr(config, name)
            if isinstance(value, (int, type(None))) and not isinstance(value, bool):
                sizes[name] = size
    return sizes


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with every size that it and its parts have made small."""
    for part in config.sub_configs:
        if isinstance(getattr(config, part, None), PreTrainedConfig):
            shrunk(getattr(config, part))
    for name, value in {**sizes_of(config), **OVERRIDES.get(config.model_type, {})}.items():
        with suppress(AttributeError):  # a property
            setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types"):
        if types := getattr(config, name, None):
            with suppress(AttributeError):
                last = "full_attention" if "full_attention" in types else types[1]
                setattr(config, name, [types[0], last])
    return config


def built(kind: type[PreTrainedConfig], layers: int) -> PreTrainedConfig:
    """A config that was given the sizes, and told itself what follows from them."""
    sizes = sizes_of(kind())
    counts = {name: layers for name in ("num_hidden_layers", "n_layer", "num_layers") if name in sizes}
    return kind(**{**sizes, **counts, **OVERRIDES.get(kind.model_type, {})})


def own_logits(kind: type[PreTrainedConfig]) -> tuple[PreTrainedModel, torch.Tensor]:
    """A tiny language model of a type, and its logits; the first error where no way of making it small works."""
    first: BaseException | None = None
    for describe in (lambda: shrunk(kind()), lambda: built(kind, 2), lambda: built(kind, 4)):
        try:
            config = describe()
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(deepcopy(config)).num_parameters()
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size:,} parameters")
            llm = tiny_causal(config)
            with torch.no_grad():
                return llm, llm(IDS).logits
        except NOT_BUILT as error:
            first = first or error
    assert first is not None
    raise first


def reads_back(config: PreTrainedConfig) -> bool:
    """Whether a config that was made small after it was built is one that transformers builds."""
    try:
        type(config).from_dict(config.to_dict())
    except (StrictDataclassError, ValueError):
        return False
    return True


def trial_and_truth(decoder: PreTrainedModel) -> tuple[bool, bool]:
    """Whether a trial says that samples in one row stay apart, and whether three longer ones do."""
    try:
        check_packing(decoder)
        said = True
    except InputError:
        said = False
    lengths = [19, 1, 23]
    rows = torch.randint(3, VOCABULARY - 1, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    try:
        with torch.no_grad():
            packed = decoder(input_ids=rows, position_ids=places, use_cache=False)[0]
            alone = [decoder(input_ids=own, use_cache=False)[0] for own in rows.split(lengths, dim=1)]
    except (AttributeError, RuntimeError, TypeError):
        return said, False
    return said, torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_causal_type_that_can_be_built_tiny_gives_its_own_logits_or_is_refused(tmp_path: Path) -> None:
    right, unsaved, refused, untried, wrong, packs = [], [], {}, {}, {}, {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        name = kind.model_type
        try:
            llm, expected = own_logits(kind)
        except NOT_BUILT as error:
            untried[name] = f"{type(error).__name__}: {error}"[:120]
            continue
        try:
            model = whole(llm)
        except InputError as error:
            assert repr(llm.config.model_type) in str(error)
            refused[name] = str(error)
            continue
        models = [model]
        if reads_back(llm.config):
            model.save_pretrained(tmp_path / name)
            # As `tiny_causal` has it: some, in some versions of transformers, compute something else otherwise.
            loaded = FusedLlavaForConditionalGeneration.from_pretrained(tmp_path / name, attn_implementation="eager")
            models.append(loaded)
        else:
            unsaved.append(name)
        with torch.no_grad():
            difference = max(float((one(input_ids=IDS).logits - expected).abs().max()) for one in models)
        answers = [one.generate(input_ids=IDS, **GREEDY) for one in (llm, *models)]
        assert all(torch.equal(answer, answers[0]) for answer in answers), name
        right.append(name)
        if difference > 1e-4 * max(1.0, float(expected.abs().max())):
            wrong[name] = difference
        decoder = model.model.language_model
        for attention in ("eager", "sdpa"):
            with suppress(ValueError):  # some have no other attention than eager
                decoder.set_attn_implementation(attention)
                packs[name, attention] = trial_and_truth(decoder)
    print(f"right: {right}\npacks: {packs}\nunsaved: {unsaved}\nrefused: {refused}\nuntried: {untried}")

    assert wrong == {}
    assert [key for key, (said, truth) in packs.items() if said != truth] == []
    assert sum(said for said, _ in packs.values()) > len(right), "most keep samples apart with either attention"
    assert len(unsaved) <= 5
    total = len(MODEL_FOR_CAUSAL_LM_MAPPING)
    assert len(right) >= FEWEST_RIGHT * total and len(right) + len(refused) >= FEWEST_TRIED * total
    known = {
        "llama",
        "llama4_text",
        "mistral",
        "qwen2",
        "qwen3",
        "phi",
        "phi3",
        "gemma",
        "gemma2",
        "granite",
        "cohere",
        "opt",
    }
    assert known <= set(right)


@pytest.mark.parametrize("kind", ["gemma2", "vaultgemma"])
def test_capped_attention_scores_stay_capped(kind: str, tmp_path: Path) -> None:
    llm = tiny_causal(AutoConfig.for_model(kind, **TINY, head_dim=16, attn_logit_softcapping=0.05))
    with torch.no_grad():
        expected = llm(IDS).logits
        whole(llm).save_pretrained(tmp_path)
        loaded = load_model(tmp_path)
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            loaded.model.language_model.set_attn_implementation("sdpa")


def test_a_language_model_whose_scores_lost_their_cap_is_refused() -> None:
    llm = tiny_causal(Gemma2Config(**TINY, head_dim=16, attn_logit_softcapping=0.05))
    llm.config._attn_implementation = "sdpa"

    with pytest.raises(InputError, match="Gemma2ForCausalLM caps its attention scores.*attn_implementation='eager'"):
        whole(llm)


def test_a_language_model_without_the_attention_asked_for_names_the_way_out() -> None:
    llm = {"model_type": "gemma2", **TINY, "head_dim": 16}
    config = ModelConfig(llm="none", llm_pretrained=False, llm_architecture=llm)

    with pytest.raises(InputError, match=r"scaled_dot_product_attention yet.* Try `--model.attention eager`"):
        build_recipe_model(config, read_language_files(config, offline=True), device="meta")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b""])
def test_a_damaged_file_of_weights_is_told_and_never_as_something_to_trust(content: bytes, tmp_path: Path) -> None:
    folder = save_llm(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    recipe = ModelConfig(llm=str(folder))
    with pytest.raises(ValueError, match="its weights are no whole file of tensors .*; download them again") as error:
        _language_model(recipe, AutoConfig.from_pretrained(folder), torch.float32, "none", pretrained=True)
    assert "weights_only" not in str(error.value)
