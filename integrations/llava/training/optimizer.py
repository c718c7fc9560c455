"""What an optimizer is given: the trained parameters in groups, each with its learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from integrations.llava.modeling import part_of

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, *, learning_rate: float, learning_rates: Mapping[str, float] | None = None, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of trainable parameters for a torch optimizer, none empty; `names` lists the parameters of each.

    Biases and everything inside norms are never decayed.

    Args:
        model: the whole model.
        learning_rate: of parts that `learning_rates` does not name.
        learning_rates: part -> its peak learning rate.
        weight_decay: of the parameters that are decayed.
    """
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    }
    rates = {"": learning_rate, **(learning_rates or {})}
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (part, decayed): {"params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0, "lr": rate}
        for part, rate in rates.items()
        for decayed in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            group = groups[part if part in rates else "", name not in norms and "bias" not in name]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups.values() if group["params"]]
