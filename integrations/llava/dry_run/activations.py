"""Bytes that autograd keeps of a language model: which tensors each block saves for its backward pass.

Counted per token, for blocks like Llama's (D width, F of the MLP, Q of all query heads, K of all key-value heads, h
heads), and held against what autograd really saves by a test:

    float32 weights under autocast    26 D + 4 Q + 4 K + 8 F + 4 h    the sum of residuals is float32, and every linear
                                                                      layer keeps a bf16 copy of its input
    bf16 weights that learn           16 D + 4 Q + 4 K + 8 F + 4 h    FSDP2's and DeepSpeed's mixed precision
    bf16 weights, frozen               8 D + 4 Q + 4 K + 6 F + 4 h    inputs of linear layers are not needed
    float32 throughout                24 D + 8 Q + 8 K + 16 F + 4 h
    a LoRA adapter, besides            2 W + W (dropout) + 2 r        W what it reads, r its rank; it computes in bf16

With checkpointing only each block's input stays, and one block at a time is computed again.
"""

from __future__ import annotations

from typing import Literal

from .facts import Block

__all__ = ["Weights", "block_bytes", "residual_bytes"]

Weights = Literal["autocast", "bf16", "fp32"]
"""How trained weights enter the computation: float32 under autocast, bf16 copies of an engine, or plain float32."""


def residual_bytes(block: Block, weights: Weights) -> int:
    """Bytes of one token between two blocks: 4 D or 2 D.

    The embedding decides, which autocast leaves alone: float32 if it learns.
    """
    wide = weights == "fp32" or (weights == "autocast" and _learns(block))
    return block.hidden * (4 if wide else 2)


def block_bytes(block: Block, weights: Weights, *, dropout: bool = False) -> int:
    """Bytes that a block saves for its backward pass, per token, without weights.

    `dropout` says whether LoRA adapters drop some of their input.
    """
    width, mlp, attention = block.hidden, block.intermediate, block.queries + block.keys
    if weights == "fp32":
        saved = 24 * width + 8 * attention + 16 * mlp if _learns(block) else 8 * width + 8 * attention + 12 * mlp
    elif not _learns(block):
        saved = 8 * width + 4 * attention + 6 * mlp
    elif weights == "autocast":
        saved = 26 * width + 4 * attention + 8 * mlp
    else:
        saved = 16 * width + 4 * attention + 8 * mlp
    size = 4 if weights == "fp32" else 2
    for read, rank in block.adapters:
        saved += (size + dropout) * read + size * rank
    statistics = 4 * block.heads + 2 * 4
    return saved + statistics


def _learns(block: Block) -> bool:
    """Tell whether the block's own weights learn, not only adapters."""
    return block.trained > 0 and not block.adapters
