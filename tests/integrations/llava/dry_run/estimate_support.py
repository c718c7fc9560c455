"""Recipes made small, and a measure of what estimates are held against: bytes that live tensors take."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.modeling.build import Assembled

__all__ = ["IMAGE_SIZE", "LiveBytes", "make_batch", "small_recipe"]

IMAGE_SIZE = 56

_SMALL = {
    "model.backbone_pretrained": False,
    "model.backbone_options": {"embed_dim": 32, "num_heads": 2},
    "model.image_size": IMAGE_SIZE,
    "model.llm_pretrained": False,
    "model.llm_architecture.hidden_size": 64,
    "model.llm_architecture.intermediate_size": 160,
    "model.llm_architecture.num_hidden_layers": 3,
    "model.llm_architecture.num_attention_heads": 4,
    "model.llm_architecture.vocab_size": 500,
    "finetune.lora.quantize": "none",
}


def small_recipe(name: str, tokenizer: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe at a size that runs in a moment; its depth stays."""
    heads = {"model.fuser_options": {"num_heads": 2}} if name.startswith("mmfuser") else {}
    return load_recipe(name, _SMALL | heads | {"model.tokenizer": str(tokenizer)} | dict(overrides or {}))


def make_batch(assembled: Assembled, *, samples: int, text: int) -> dict[str, torch.Tensor]:
    """Make samples of one image and some text each, all supervised."""
    image = assembled.model.config.image_seq_length
    ids = torch.full((samples, image + text), 5)
    ids[:, 1 : 1 + image] = assembled.image_token_id
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.zeros(samples, 3, IMAGE_SIZE, IMAGE_SIZE)}


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make until they are freed.

    Args:
        model: its parameters and buffers count from the beginning.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._known.pop(key)
