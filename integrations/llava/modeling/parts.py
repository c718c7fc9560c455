"""Backbone, fuser, projector, language model: which of them a parameter belongs to, and which of them learn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from integrations.llava.config import PARTS

__all__ = ["count_parameters", "learns", "part_of", "set_trainable"]


def part_of(name: str) -> str:
    """The part that a parameter or buffer belongs to.

    Args:
        name: in the whole model, also where DDP, FSDP or `torch.compile` put a wrapper around the model or its parts.

    Returns:
        One of `PARTS`; an empty text for what belongs to none.
    """
    return next((part for part, prefixes in PARTS.items() if any(prefix in name for prefix in prefixes)), "")


def learns(module: nn.Module) -> bool:
    """Tell whether any parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def set_trainable(model: nn.Module, parts: Sequence[str], *, adapters_only: bool = False) -> dict[str, dict[str, int]]:
    """Let some parts learn and freeze all others.

    Args:
        model: the whole model, changed in place.
        parts: names from `PARTS`.
        adapters_only: of the language model, only its LoRA adapters learn.

    Returns:
        As `count_parameters`.
    """
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in parts and not (adapters_only and part == "llm" and ".lora_" not in name))
    return count_parameters(model)


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Per part, its number of trainable and of frozen parameters."""
    counts = {part: {"trainable": 0, "frozen": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[part_of(name)]["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts
