"""Two stages on a tiny model of each family of language models, up to the answers that transformers alone gives.

Tokenizers have the families' control tokens and ways: with and without a first or unknown token, blanks that tokens
swallow, more embeddings than tokens, tied ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from integrations.llava.config import Recipe, load_recipe
from integrations.llava.data import Collator, image_names
from integrations.llava.inference import load_predictor
from integrations.llava.prompts import IGNORE_INDEX, TEMPLATES, TOKENIZER
from integrations.llava.training import train
from tests.integrations.llava.prompts.published_templates import PUBLISHED, family_tokenizer
from tests.integrations.llava.tiny_parts import tiny_overrides

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
OFF = {"enable_thinking": False, "date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Family:
    """A language model's class and what is its own; `template` is a recipe's."""

    config: type[PreTrainedConfig]
    template: str
    end: str
    sentencepiece: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"


TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "llama-2": Family(LlamaConfig, "llama-2", "</s>", sentencepiece=True),
    "llama-3": Family(LlamaConfig, "llama-3", "<|eot_id|>"),
    "qwen2.5": Family(Qwen2Config, TOKENIZER, "<|im_end|>", fields=TIED),
    "qwen3": Family(Qwen3Config, TOKENIZER, "<|im_end|>", fields=TIED | {"head_dim": 16}),
    "mistral": Family(MistralConfig, "mistral", "</s>", sentencepiece=True),
    "phi-3": Family(Phi3Config, "phi", "<|end|>", sentencepiece=True),
    "gemma-2": Family(Gemma2Config, "gemma", "<end_of_turn>", fields=TIED | {"head_dim": 16}, attention="eager"),
    "gemma-3": Family(Gemma3TextConfig, TOKENIZER, "<end_of_turn>", fields=TIED | {"head_dim": 16}),
}


def save_family(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """Save a random model with its tokenizer; it has rows for tokens that the tokenizer does not know."""
    family = FAMILIES[name]
    tokenizer = family_tokenizer(PUBLISHED[name], sentencepiece=family.sentencepiece)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = family.config(vocab_size=len(tokenizer) + 70, **special, **SIZES, **family.fields)
    AutoModelForCausalLM.from_config(config, attn_implementation=family.attention).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def recipe_of(name: str, backbone: Path, llm: Path, data: Path) -> Recipe:
    overrides = tiny_overrides(backbone, llm, data) | {
        "model.layers": [1, 2, 3, 4],
        "model.fuser_options": {"num_heads": 4},
        "model.attention": FAMILIES[name].attention,
        "finetune.template": FAMILIES[name].template,
    }
    for stage in ("pretrain", "finetune"):
        overrides |= {f"{stage}.gradient_checkpointing": False, f"{stage}.max_steps": 2}
    return load_recipe("mmfuser_7b", overrides)


def spans(text: str, answers: Sequence[str], end: str) -> Iterator[tuple[int, int]]:
    """Places of answers with their ends in a text, looked for from the front; a blank in front of one belongs to it."""
    place = 0
    for answer in answers:
        start = text.index(answer, place)
        place = text.index(end, start) + len(end)
        yield start - (text[start - 1] == " "), place


def expected(sample: dict[str, Any], tokenizer: PreTrainedTokenizerBase, end: str) -> tuple[list[int], list[int]]:
    """Ids and labels by the family's own chat template and the tokenizer's offsets."""
    turns = sample["conversations"]
    chat = [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]} for turn in turns]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, **OFF))  # type: ignore[arg-type]
    bos = tokenizer.bos_token or ""
    if tokenizer("").input_ids:
        text = text.removeprefix(bos)
    found = tokenizer(text, return_offsets_mapping=True)
    supervised = list(spans(text, [turn["value"] for turn in turns if turn["from"] == "gpt"], end))
    ids, labels, ends = [], [], tokenizer.convert_tokens_to_ids(end)
    for token, (start, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        # A token that swallows the blanks behind it counts them.
        stop -= len(text[start:stop]) - len(text[start:stop].rstrip()) if token == ends else 0
        inside = any(first <= start < stop <= last for first, last in supervised)
        ids.append(token)
        labels.append(token if inside else IGNORE_INDEX)
    return ids, labels


class Says(LogitsProcessor):
    """A model that is made to say: a word, the end, the word for ever."""

    def __init__(self, word: int, end: int) -> None:
        self.said = iter([word, end, *[word] * 20])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([next(self.said)]), 0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_on_its_own_spans_and_answers_end_where_it_was_taught(
    name: str, backbone_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tokenizer = FAMILIES[name], save_family(name, tmp_path / "llm")
    recipe = recipe_of(name, backbone_folder, tmp_path / "llm", data_folder)
    folder = train(recipe, tmp_path / "run", stages=["pretrain"])
    seen: dict[str, Any] = {}
    collate = Collator.__call__

    def look(self: Collator, samples: Sequence[Any]) -> Any:
        seen.update({sample["id"]: sample for sample in samples})
        return collate(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", look)
        train(recipe, folder, stages=["finetune"])

    samples = {sample["id"]: sample for sample in json.loads((data_folder / "train.json").read_text())}
    assert {bool(image_names(samples[own])) for own in seen} == {True, False}
    for own, sample in seen.items():
        ids, labels = expected(samples[own], tokenizer, family.end)
        kept = [label for label in sample["labels"].tolist() if label != IGNORE_INDEX]
        assert kept == [label for label in labels if label != IGNORE_INDEX]
        if not image_names(samples[own]):
            length = len(sample["input_ids"])
            assert (sample["input_ids"].tolist(), sample["labels"].tolist()) == (ids[:length], labels[:length])

    end = tokenizer.convert_tokens_to_ids(family.end)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    taught = model.generation_config.eos_token_id
    assert end in (taught if isinstance(taught, list) else [taught])
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == ("tie_word_embeddings" in family.fields)
    with Image.open(data_folder / "0.png") as opened:
        picture = opened.convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What number is it?"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    predictor = load_predictor(folder)
    asked = predictor.prepare(picture, "What number is it?")
    assert torch.equal(batch["input_ids"][0], asked["input_ids"])
    assert predictor.prepare.ends[0] == end
    assert {*predictor.prepare.ends} == {*(taught if isinstance(taught, list) else [taught])}

    word = tokenizer("x", add_special_tokens=False).input_ids[-1]
    answer = model.generate(**batch, max_new_tokens=9, logits_processor=LogitsProcessorList([Says(word, end)]))
    assert answer[0, batch["input_ids"].shape[1] :].tolist() == [word, end]
    assert isinstance(predictor([picture], ["What number is it?"], max_new_tokens=3)[0], str)


def test_every_template_of_a_family_is_trained_with() -> None:
    """What docs/language_models.md says was tested."""
    trained = {PUBLISHED[name].family for name in FAMILIES} | {family.template for family in FAMILIES.values()}
    assert {"llama-2", "llama-3", "mistral", "phi", "gemma", "gemma-3", TOKENIZER} <= trained
    assert trained - {None, TOKENIZER} <= TEMPLATES.keys()
