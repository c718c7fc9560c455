"""The parts of a model (backbone, fuser, projector, language model): built, kept as built, trained or frozen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from integrations.llava.config import PARTS
from layerfuse.backbones import Backbone, backbone_from_config
from layerfuse.fusers import Fuser, fuser_from_config

from .mergers import Merger, create_merger

__all__ = [
    "Projector",
    "block_classes",
    "build_part",
    "count_parameters",
    "draw",
    "forbid_uncapped_attention",
    "keep_as_built",
    "learns",
    "loses_cap",
    "part_of",
    "restore_buffers",
    "set_attention",
    "set_trainable",
]

# Their attention scores are capped (config.attn_logit_softcapping), which `sdpa` cannot do. transformers before 5.21
# chose it for them all the same, and left the cap out without a word.
_CAPPED = ("gemma2", "vaultgemma")
# torch has one list of these hooks for all threads.
_HOOK = threading.Lock()
_Part = TypeVar("_Part", bound=nn.Module)


class Projector(nn.Module):
    """LLaVA-1.5's `mlp2x_gelu`: linear, GELU, linear."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project (B, N, C_out) fused tokens to (B, N, D)."""
        projected: torch.Tensor = self.linear_2(self.act(self.linear_1(tokens)))
        return projected


# What draws its own weights; a fuser within a merger has drawn its own by itself.
_DRAWN = (Backbone, Fuser, Projector, Merger)


def build_part(build: Callable[[], _Part]) -> _Part:
    """Build a backbone or fuser in float32 on torch's default device, and convert it to torch's default dtype.

    `from_pretrained` makes the meta device the default one. There nothing is drawn and no weight keeps memory, while
    buffers that no checkpoint holds (rotary tables, position ids) are computed, for `restore_buffers`. transformers
    will not initialise the part anew.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    # timm computes tables anew when their type changes, so that has to be on a device that has numbers, too.
    with torch.device("cpu" if device.type == "meta" else device):
        torch.set_default_dtype(torch.float32)
        try:
            part = _without_weights(build) if device.type == "meta" else build()
        finally:
            torch.set_default_dtype(dtype)
        keep_as_built(part.to(dtype))
    return part.to(device)


def _without_weights(build: Callable[[], _Part]) -> _Part:
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    with _HOOK:
        hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
        try:
            return build()
        except RuntimeError:  # a module of the user's own may need numbers while it is built
            hook.remove()
            return build()
        finally:
            hook.remove()


def set_attention(backbone: nn.Module, implementation: str | None) -> None:
    """Let a backbone of transformers compute attention as it was asked for; other libraries choose themselves."""
    for part in backbone.modules():
        if isinstance(part, PreTrainedModel) and implementation is not None:
            able = {"eager": True, "sdpa": part._supports_sdpa, "flex_attention": part._supports_flex_attn}
            if able.get(implementation, part._supports_flash_attn):
                part.set_attn_implementation(implementation)


def forbid_uncapped_attention(config: PreTrainedConfig) -> None:
    """Tell transformers before a language model is built that `sdpa` is not for it, if that is so.

    It then chooses eager attention where none was asked for, and refuses `sdpa` by name, as from 5.21 on by itself.
    """
    if loses_cap(config, "sdpa"):
        for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
            built: Any = mapping[type(config)]
            built._supports_sdpa = False


def loses_cap(config: PreTrainedConfig, implementation: str | None) -> bool:
    """Tell whether an attention implementation leaves out the cap that a language model's scores have."""
    capped = config.model_type in _CAPPED and getattr(config, "attn_logit_softcapping", None) is not None
    return capped and implementation == "sdpa"


@torch.no_grad()
def restore_buffers(model: nn.Module) -> None:
    """Give buffers that no checkpoint holds the values that `keep_as_built` remembers, if they have memory."""
    for module in model.modules():
        for name, value in getattr(module, "_kept_buffers", {}).items():
            buffer = module.get_buffer(name)
            if not buffer.is_meta:
                buffer.copy_(value)


def keep_as_built(module: nn.Module) -> None:
    """Keep transformers from initialising a module anew, and remember the buffers that no checkpoint holds."""
    for child in module.modules():
        child._is_hf_initialized = True  # type: ignore[assignment]
        buffers = {name: child._buffers.get(name) for name in child._non_persistent_buffers_set}
        child._kept_buffers = {  # type: ignore[assignment]
            name: buffer.detach().clone() for name, buffer in buffers.items() if buffer is not None
        }


@torch.no_grad()
def draw(model: nn.Module, keys: Set[str]) -> None:
    """Draw weights of parts that are kept as built, which transformers leaves alone, as those parts themselves do."""
    for path, part in model.named_modules():
        weights = dict(part.named_parameters(prefix=path)) if isinstance(part, _DRAWN) else {}
        if missing := keys & weights.keys():
            with torch.device("cpu"):
                if isinstance(part, Backbone):
                    built: nn.Module = backbone_from_config(part.config)
                elif isinstance(part, Fuser):
                    built = fuser_from_config(part.config)
                elif isinstance(part, Merger):
                    built = create_merger(**part.described)
                else:
                    assert isinstance(part, Projector)
                    built = Projector(part.linear_1.in_features, part.linear_2.out_features)
            drawn = dict(built.named_parameters(prefix=path))
            for key in missing:
                weights[key].copy_(drawn[key])


def part_of(name: str) -> str:
    """The one of `PARTS` that a parameter or buffer belongs to; an empty text for none.

    Its name may be that in a model around which, or around whose parts, DDP, FSDP or `torch.compile` put a wrapper.
    """
    return next((part for part, prefixes in PARTS.items() if any(prefix in name for prefix in prefixes)), "")


def learns(module: nn.Module) -> bool:
    """Tell whether any parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def set_trainable(model: nn.Module, parts: Sequence[str], *, adapters_only: bool = False) -> dict[str, dict[str, int]]:
    """Let some of `PARTS` learn and freeze the others; `adapters_only`: of the language model, LoRA alone learns."""
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in parts and not (adapters_only and part == "llm" and ".lora_" not in name))
    return count_parameters(model)


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Numbers of trainable and of frozen parameters, per part."""
    counts = {part: {"trainable": 0, "frozen": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[part_of(name)]["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def block_classes(backbone: Backbone) -> set[str]:
    """Names of the classes of a backbone's blocks, which are its largest list of modules."""
    lists = [module for module in backbone.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    blocks = max(lists, key=lambda blocks: sum(part.numel() for part in blocks.parameters()), default=())
    return {type(block).__name__ for block in blocks}
