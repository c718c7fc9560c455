"""Samples in one row: language models compute of each what they compute of it alone, or are refused by name."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    BloomConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    masking_utils,
)

from integrations.llava.modeling import packing
from integrations.llava.modeling.packing import attend_by_sample, check_packing
from layerfuse.errors import InputError
from tests.integrations.llava.modeling.test_language_models import TINY, VOCABULARY

LENGTHS = [9, 1, 6]
SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CHUNKED: dict[str, Any] = {"attention_chunk_size": 4, "intermediate_size_mlp": 48, "head_dim": 16}
KINDS: dict[str, PreTrainedConfig] = {
    "causal": LlamaConfig(**TINY),
    "shared keys": LlamaConfig(**(TINY | {"num_key_value_heads": 1})),
    "sliding window": MistralConfig(**TINY, sliding_window=3),
    "sliding window in one layer": Qwen2Config(**TINY, **SLIDING),
}
CHUNKS = Llama4TextConfig(**TINY, **CHUNKED)
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # not yet in transformers 5.17
    KINDS["chunks"] = CHUNKS
# Lengths of what attends within itself in each layer, and whether under a mask.
ATTENDS: dict[str, list[tuple[list[int], bool]]] = {
    "causal": [(LENGTHS, False)] * 2,
    "shared keys": [(LENGTHS, False)] * 2,
    "sliding window": [(LENGTHS, True)] * 2,
    "sliding window in one layer": [(LENGTHS, False), (LENGTHS, True)],
    "chunks": [([4, 4, 1, 1, 4, 2], False)] * 2,
}


def decoder(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model  # type: ignore[no-any-return]


def hidden(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **options)[0]  # type: ignore[no-any-return]


def row_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, and position_ids that begin anew with each sample."""
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", KINDS)
def test_samples_of_a_row_are_what_they_are_alone(name: str, attention: str) -> None:
    model = decoder(KINDS[name], attention)
    ids, places = row_of(LENGTHS)
    alone = torch.cat([hidden(model, own) for own in ids.split(LENGTHS, dim=1)], dim=1)
    check_packing(model)

    assert model.config._attn_implementation == {"sdpa": "sdpa_by_sample", "eager": "eager"}[attention]
    torch.testing.assert_close(hidden(model, ids, position_ids=places), alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(hidden(model, ids), alone, atol=1e-2), "as one sample they are something else"


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_computed_within_samples_and_masked_only_where_a_sample_has_to_be(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(KINDS[name])
    check_packing(model)
    calls: list[tuple[int, int, bool]] = []
    plain = packing.sdpa_attention_forward

    def noted(module: Any, query: Any, key: Any, *value: Any, attention_mask: Any, **options: Any) -> Any:
        calls.append((query.shape[2], key.shape[2], attention_mask is not None))
        return plain(module, query, key, *value, attention_mask=attention_mask, **options)

    monkeypatch.setattr(packing, "sdpa_attention_forward", noted)
    ids, places = row_of(LENGTHS)
    hidden(model, ids, position_ids=places)

    assert calls == [(length, length, masked) for lengths, masked in ATTENDS[name] for length in lengths]


@pytest.mark.parametrize("name", KINDS)
def test_nothing_changes_for_padded_rows_single_samples_and_generation(name: str) -> None:
    plain, by_sample = decoder(KINDS[name]), decoder(KINDS[name])
    attend_by_sample(by_sample)
    ids, _ = row_of([5, 5])
    rows, single = ids.view(2, 5), ids[:, :5]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    given: list[dict[str, Any]] = [{"attention_mask": mask}, {}, {"position_ids": torch.arange(5)[None]}]
    for options in given:
        assert torch.equal(hidden(by_sample, rows, **options), hidden(plain, rows, **options))
        if "attention_mask" not in options:
            assert torch.equal(hidden(by_sample, single, **options), hidden(plain, single, **options))
    # Its name depends on the version of transformers.
    name = next(name for name in ("cache", "past_key_values") if name in signature(plain.forward).parameters)
    ours, theirs = (
        model(input_ids=single[:, :1], **{name: model(input_ids=single, use_cache=True)[name]})[0]
        for model in (by_sample, plain)
    )
    assert torch.equal(ours, theirs)


def test_the_name_is_not_saved(tmp_path: Any) -> None:
    model = decoder(LlamaConfig(**TINY))
    check_packing(model)
    model.save_pretrained(tmp_path)

    assert "by_sample" not in (tmp_path / "config.json").read_text()
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_trial_leaves_mode_and_random_numbers_alone() -> None:
    model = decoder(LlamaConfig(**TINY)).train()
    before = torch.get_rng_state()
    check_packing(model)

    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_language_model_in_bf16_passes_the_trial_too() -> None:
    check_packing(decoder(LlamaConfig(**TINY)).to(torch.bfloat16), "bf16")


def test_a_language_model_without_positions_is_refused_by_its_type() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2))

    with pytest.raises(
        InputError, match=r"row, which BloomModel cannot take apart: it takes no position_ids, which say"
    ):
        check_packing(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_language_model_that_looks_at_the_sample_before_is_refused_by_name(attention: str) -> None:
    """OPT has position_ids, and its mask does not read them."""
    model = decoder(OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=32), attention)

    with pytest.raises(InputError, match=r"which OPTModel cannot take apart: what it computes of a sample depends on"):
        check_packing(model)


def test_a_language_model_that_reads_the_mask_itself_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(LlamaConfig(**TINY))
    attention: Any = model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, extra=kwargs["attention_mask"].dtype)

    with pytest.raises(InputError, match=r"LlamaModel cannot take apart: it cannot be tried \(AttributeError: .*dtype"):
        check_packing(model)


def test_chunks_that_are_counted_over_the_whole_row_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.17 does."""
    monkeypatch.delattr(masking_utils, "remap_positions_for_packed_sequence", raising=False)

    with pytest.raises(
        InputError, match=r"which Llama4TextModel cannot take apart: .* counts chunks of attention over"
    ):
        check_packing(decoder(CHUNKS))


@pytest.mark.parametrize("attention", ["flex_attention", "meta"])
def test_what_cannot_be_tried_here_is_taken_at_its_word(attention: str) -> None:
    with torch.device("meta" if attention == "meta" else "cpu"):
        config = LlamaConfig(**TINY)
        model = AutoModel.from_config(config, attn_implementation="sdpa" if attention == "meta" else attention)
    model.forward = lambda position_ids: 1 / 0

    check_packing(model)
