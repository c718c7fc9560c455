"""Quantised weights through bitsandbytes: of the language model's linear layers, and of nothing else."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from integrations.llava.config import PARTS
from layerfuse.errors import InputError, MissingPackageError
from layerfuse.registry import unknown_name_message

__all__ = ["QUANTIZATIONS", "Quantization", "keep_unpackable", "quantization_config"]

Quantization = Literal["none", "int8", "nf4"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
"""Ways to store weights: as they are, in 8 bits (LLM.int8, arXiv:2208.07339), in 4 (NF4, arXiv:2305.14314)."""

# Full names: bitsandbytes compares from the start of a module's name, and "multi_modal_projector" alone matches none.
_KEPT = (*(prefix.rstrip(".") for part, prefixes in PARTS.items() if part != "llm" for prefix in prefixes), "lm_head")
# On CPUs that multiply bfloat16 by themselves, bitsandbytes packs 4-bit weights of so many rows and columns together.
_PACKED_ROWS, _PACKED_COLUMNS = 32, 64


def quantization_config(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Describe a quantisation for `from_pretrained`, of a whole model or of a language model alone; None for "none".

    Backbone, fuser, projector and the head stay as they are. `dtype` is what 4-bit weights are expanded to for use.

    Raises:
        ValueError: if there is no such quantisation.
        ImportError: if bitsandbytes is needed and not installed.
    """
    if kind not in QUANTIZATIONS:
        raise InputError(unknown_name_message("quantisation", kind, QUANTIZATIONS))
    if kind == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f"{kind} weights need the package bitsandbytes; install it with `pip install 'layerfuse[quantize]'`."
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(_KEPT))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(_KEPT),
    )


def keep_unpackable(model: nn.Module) -> None:
    """Let 4-bit layers of sizes that bitsandbytes cannot pack for a CPU compute from the weights as they are stored.

    It packs a layer when it is first used, whatever its sizes, and fails on those that are no multiples of its blocks.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        if layer.out_features % _PACKED_ROWS or layer.in_features % _PACKED_COLUMNS:
            layer.support_avx512bf16_for_cpu = False
