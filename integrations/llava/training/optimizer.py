"""The optimizer of a stage: trained parameters in groups with their learning rates, and a class of transformers' names.

Which class is possible is tried on a small weight before anything is read: one whose states a checkpoint would not hold
is refused, whatever it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from integrations.llava.config import StageConfig
from integrations.llava.modeling import part_of
from layerfuse.backbones import Backbone
from layerfuse.errors import InputError, MissingPackageError

from .resume import as_state, as_stored

__all__ = ["build_optimizer", "check_optimizer", "parameter_groups", "state_bytes_each"]

# Edge of the weight that is tried: bitsandbytes keeps 8 bits of weights from 4,096 numbers on.
_EDGE = 64
# What some of transformers' names bring in place of groups of ours: they choose parameters, or step while gradients
# are computed (GaLore, APOLLO, LOMO).
_OWN_GROUPS = {"params", "model", "optimizer_dict"}
# Elementwise, and without a state before the first step: an engine may take what they are given apart.
_DIVISIBLE = ("adamw_torch", "adamw_torch_fused", "sgd")


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    learning_rates: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups of trainable parameters for a torch optimizer, none empty; `names` lists the parameters of each.

    Biases and everything inside norms are never decayed.

    Args:
        model: the whole model.
        learning_rate: of parts that `learning_rates` does not name.
        learning_rates: part -> its peak learning rate.
        layer_decay: block i of a backbone's n blocks (those up to its deepest tapped layer, counted from 1) learns with
            the rate of the part times layer_decay ** (n - i), what stands outside the blocks (embeddings, the norm
            before them) as block 0. As in BEiT (arXiv:2106.08254; `get_num_layer_for_vit` of its `optim_factory.py`)
            and timm's `param_groups_layer_decay`, where a head behind the blocks makes n one larger.
        weight_decay: of the parameters that are decayed.
    """
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    }
    rates = {"": learning_rate, **(learning_rates or {})}
    behind = _blocks_behind(model) if layer_decay != 1.0 else {}
    groups: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name) if part_of(name) in rates else ""
            exempt, depth = name in norms or "bias" in name, behind.get(parameter, 0)
            fresh: dict[str, Any] = {"params": [], "names": [], "weight_decay": 0.0 if exempt else weight_decay}
            group = groups.setdefault((list(rates).index(part), depth, exempt), fresh)
            group["lr"] = rates[part] * layer_decay**depth
            group["params"].append(parameter)
            group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _blocks_behind(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many blocks of its backbone stand behind a parameter, for those of backbones."""
    behind: dict[nn.Parameter, int] = {}
    for backbone in (module for module in model.modules() if isinstance(module, Backbone)):
        blocks = backbone.blocks
        behind |= dict.fromkeys(backbone.parameters(), len(blocks))
        for number, block in enumerate(blocks, 1):
            behind |= dict.fromkeys(block.parameters(), len(blocks) - number)
    return behind


def build_optimizer(
    groups: Iterable[Mapping[str, Any]], args: TrainingArguments, options: Mapping[str, Any]
) -> Optimizer:
    """The optimizer that `args.optim` names, over groups as `parameter_groups` makes them.

    Args:
        groups: of parameters.
        args: transformers' arguments, which give the class and its usual arguments.
        options: arguments of the class, before those.
    """
    cls, usual = Trainer.get_optimizer_cls_and_kwargs(args)
    name = OptimizerNames(args.optim).value
    if _OWN_GROUPS & usual.keys() or not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise InputError(
            f"optimizer {name!r} makes groups of parameters of its own, so that learning rates by part and "
            "checkpoints would be lost; take another, such as adamw_torch_fused, adafactor or adamw_8bit."
        )
    plain = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    optimizer: Optimizer = cls(plain, **{**usual, **options})
    return optimizer


def check_optimizer(
    config: StageConfig, args: TrainingArguments, device: torch.device, *, num_processes: int = 1
) -> None:
    """Try a stage's optimizer: that it can be made and stepped on a device, and goes on from a checkpoint as it was.

    Raises:
        ValueError: if not, or an engine cannot take its states apart.
        ImportError: if its package is missing.
    """
    name = config.optimizer
    if num_processes > 1 and config.engine != "ddp" and name not in _DIVISIBLE:
        raise InputError(
            f"optimizer {name!r} has not been tried with weights or states that an engine takes apart, as "
            f"{config.engine!r} does; take one of {', '.join(_DIVISIBLE)}, or engine 'ddp'."
        )
    try:
        left, first = _around(_values(device), config, args)
        _step(left, first, torch.cos)
        gone_on, second = _around(first.detach().clone(), config, args)
        gone_on.state[second] = {
            kind: as_state(second, as_stored(value).clone(), on_device=bool(gone_on.param_groups[0].get("fused")))
            for kind, value in left.state[first].items()
            if value is not None
        }
        for optimizer, weight in ((left, first), (gone_on, second)):
            _step(optimizer, weight, torch.sin)
    except ImportError as error:
        raise MissingPackageError(f"optimizer {name!r} needs a package that is not installed: {error}") from error
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"optimizer {name!r} cannot be used on {device.type} with optimizer_options={config.optimizer_options}"
            f" ({reason}). The options are arguments of its class; take others, or another optimizer."
        ) from error
    if not torch.equal(first, second):
        raise InputError(
            f"optimizer {name!r} keeps something that a checkpoint does not hold, so that an interrupted run would go "
            "on otherwise; take another, such as adamw_torch_fused, adafactor or adamw_8bit."
        )


def state_bytes_each(config: StageConfig, args: TrainingArguments, device: torch.device) -> float:
    """Bytes of a stage's optimizer states for each trained number: 8 for AdamW, 2 and some for its 8-bit kind."""
    optimizer, weight = _around(_values(device), config, args)
    _step(optimizer, weight, torch.cos)
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    # What is kept once a weight (a count, a table of 8-bit codes) is no matter.
    return sum(value.nbytes for value in tensors if value.numel() * _EDGE >= weight.numel()) / weight.numel()


def _values(device: torch.device) -> torch.Tensor:
    return torch.linspace(-1, 1, _EDGE**2, device=device).view(_EDGE, _EDGE)


def _around(values: torch.Tensor, config: StageConfig, args: TrainingArguments) -> tuple[Optimizer, nn.Parameter]:
    """A stage's optimizer around a small weight."""
    weight = nn.Parameter(values)
    groups = [{"params": [weight], "lr": config.learning_rate or 1e-3, "weight_decay": config.weight_decay}]
    return build_optimizer(groups, args, config.optimizer_options), weight


def _step(optimizer: Optimizer, weight: nn.Parameter, gradient: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight.grad = gradient(_values(weight.device))
    optimizer.step()
