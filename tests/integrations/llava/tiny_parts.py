"""Tiny tokenizers, conversations and recipe values that the tests of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["human_and_gpt", "make_tokenizer", "tiny_overrides"]

_CORPUS = [
    "A chat between a user and an assistant. USER: What number is it? ASSISTANT: It is number one on a wall."
] * 3
_SPECIAL = ["<unk>", "<s>", "</s>"]


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer: `llama` writes a blank first as SentencePiece does, `bytes` is GPT-2's kind."""
    model = models.BPE(unk_token="<unk>", byte_fallback=kind == "llama", fuse_unk=True)
    tokenizer = Tokenizer(model)
    if kind == "llama":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet: list[str] = []
        special = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), _SPECIAL
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((word for line in _CORPUS for word in line.split(" ")), trainer)
    if kind == "llama":
        # The bytes are ordinary vocabulary, not special tokens.
        description = json.loads(tokenizer.to_str())
        description["added_tokens"] = description["added_tokens"][: len(_SPECIAL)]
        tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def human_and_gpt(*texts: str) -> list[dict[str, str]]:
    """Turns that alternate, the human first."""
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def tiny_overrides(backbone: Path, llm: Path, data: Path) -> dict[str, Any]:
    """Everything about a recipe that has to be smaller to run in a test."""
    overrides: dict[str, Any] = {
        "model.family": "transformers",
        "model.backbone": str(backbone),
        "model.llm": str(llm),
        "pretrain.data.path": str(data / "pretrain.json"),
        "finetune.data.path": str(data / "train.json"),
    }
    for stage in ("pretrain", "finetune"):
        small = {
            "max_steps": 3,
            "batch_size": 4,
            "micro_batch_size": 4,
            "num_workers": 0,
            "precision": "fp32",
            "log_every": 2,
        }
        overrides |= {f"{stage}.{key}": value for key, value in small.items()}
        overrides[f"{stage}.data.image_folder"] = str(data)
    return overrides
