"""Tiny tokenizers, models, conversations and recipe values that the tests of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "RunsCode",
    "human_and_gpt",
    "make_tokenizer",
    "save_backbone",
    "save_llm",
    "tiny_clip",
    "tiny_llm",
    "tiny_overrides",
]

_CORPUS = [
    "A chat between a user and an assistant. USER: What number is it? ASSISTANT: It is number one on a wall."
] * 3
_SPECIAL = ["<unk>", "<s>", "</s>"]
_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


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


def tiny_llm(vocabulary: int, **fields: Any) -> LlamaForCausalLM:
    """A random Llama of two blocks; fields of its config may be set."""
    small = {**_TINY, "num_hidden_layers": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**small, **fields}))


def save_llm(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **fields: Any) -> Path:
    """Save a tiny Llama with its tokenizer, as transformers saves them; of kind `llama` if none is given."""
    tokenizer = tokenizer or make_tokenizer("llama")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    tiny_llm(len(tokenizer), **special, **fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_clip(**fields: Any) -> CLIPVisionModel:
    """A random CLIP vision model of five blocks on 32-pixel images, 16 patches; fields of its config may be set."""
    small = {**_TINY, "num_hidden_layers": 5, "image_size": 32, "patch_size": 8}
    return CLIPVisionModel(CLIPVisionConfig(**{**small, **fields}))


def save_backbone(folder: Path, **fields: Any) -> Path:
    """Save a tiny CLIP vision model as transformers does."""
    torch.manual_seed(0)
    tiny_clip(**fields).save_pretrained(folder)
    return folder


def human_and_gpt(*texts: str) -> list[dict[str, str]]:
    """Turns that alternate, the human first."""
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


class RunsCode:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


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
