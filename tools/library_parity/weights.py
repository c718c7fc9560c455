"""Weights carried from a model of one library into one of another; timm's names are what the others are read as."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from layerfuse.errors import InputError

__all__ = ["carry_weights", "parts_of"]

State = dict[str, torch.Tensor]

# Names that timm gives one thing in different classes (VisionTransformer, Eva, Beit, NaFlexVit), as one.
_TIMM = (
    (r"^embeds\.proj\.", "patch_embed.proj."),
    (r"^embeds\.", ""),
    (r"\.ls(\d)\.gamma$", r".gamma_\1"),
    (r"\.attn\.([qkv])_bias$", r".attn.\1.bias"),
    (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
)
# Modules of transformers were renamed between 5.17 and 5.24: both names stand here.
_TRANSFORMERS = (
    (r"^embeddings\.(class_embedding|cls_token)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embed(ding|dings)?\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.rms_norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.(attention|self_attn)\.(attention\.)?(q_proj|query)\.", ".attn.q."),
    (r"\.(attention|self_attn)\.(attention\.)?(k_proj|key)\.", ".attn.k."),
    (r"\.(attention|self_attn)\.(attention\.)?(v_proj|value)\.", ".attn.v."),
    (r"\.(attention|self_attn)\.(out_proj|o_proj|output\.dense|projection_layer)\.", ".attn.proj."),
    (r"\.relative_position_bias\.", ".attn."),
    (r"\.(layer_norm|rms_norm|norm)([12])\.", r".norm\2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(layer_scale([12])\.lambda1|lambda_([12]))$", r".gamma_\2\3"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.(mlp|ffn)\.(down_proj|weights_out)\.", ".mlp.fc2."),
    (r"\.(mlp|ffn)\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.(mlp|ffn)\.up_proj\.", ".mlp.fc1_x."),
)


def carry_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy every weight of a model into one of another library, in place; of both, nothing may be left over.

    From timm to transformers, or from open_clip to timm (by timm's own conversion of checkpoints) and on to
    transformers. Models are those of backbones, which pooling and head were cut off.

    Raises:
        ValueError: if a weight of either has no counterpart in the other.
    """
    if type(target).__module__.startswith("transformers."):
        _into_transformers(parts_of(source), target)
    else:
        _into_timm(source, target)


def parts_of(model: nn.Module) -> State:
    """Return the weights of a timm model under timm's names, with query, key and value apart."""
    parts: State = {}
    for key, weight in model.state_dict().items():
        name = _renamed(key, _TIMM)
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", weight.chunk(3), strict=True):
                parts[name.replace("qkv", part)] = piece
        else:
            parts[name] = weight
    return parts


def _into_timm(source: nn.Module, target: nn.Module) -> None:
    module: Any = import_module(type(target).__module__)
    converted = module.checkpoint_filter_fn({f"visual.{key}": weight for key, weight in _copied(source)}, target)
    target.load_state_dict(converted, strict=True)


def _into_transformers(parts: State, target: nn.Module) -> None:
    state = target.state_dict()
    wanted = {key: _renamed(key, _TRANSFORMERS) for key in state}
    left = dict(parts)
    if "reg_token" in wanted.values() and "reg_token" not in left:  # no registers, which transformers keeps empty
        left["reg_token"] = torch.zeros(0)
    _take_gates_apart(left, wanted.values())
    _give_class_token_a_position(left, {name: state[key] for key, name in wanted.items()})
    missing = []
    for key, name in wanted.items():
        # Without a gate, what transformers calls up_proj is timm's fc1.
        found = name if name in left else name.replace("fc1_x", "fc1")
        if found not in left or left[found].numel() != state[key].numel():
            missing.append(key)
            continue
        state[key] = left.pop(found).reshape(state[key].shape)
    if missing or left:
        raise InputError(
            f"{type(target).__name__} has weights that were not found: {', '.join(missing) or 'none'}; found but not "
            f"wanted: {', '.join(left) or 'none'}. Write their names into the tables of {__name__}."
        )
    target.load_state_dict(state, strict=True)


def _give_class_token_a_position(parts: State, wanted: Mapping[str, torch.Tensor]) -> None:
    """Take a random position off a class token that stands beside the positions, where the other library adds one."""
    if "pos_embed" not in parts or "cls_token" not in parts:
        return
    positions = parts["pos_embed"]
    if wanted["pos_embed"].numel() - positions.numel() != positions.shape[-1]:
        return
    position = torch.randn(1, 1, positions.shape[-1], generator=torch.Generator().manual_seed(7))
    parts["pos_embed"] = torch.cat([position, positions], dim=1)
    parts["cls_token"] = parts["cls_token"] - position


def _take_gates_apart(parts: State, wanted: Iterable[str]) -> None:
    """Take what timm computes in one product apart, where the other library has gate and value on their own."""
    for gate in wanted:
        packed = gate.replace("fc1_g", "fc1")
        if packed != gate and packed in parts:
            parts[gate], parts[gate.replace("fc1_g", "fc1_x")] = parts.pop(packed).chunk(2)


def _copied(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(key, weight.clone()) for key, weight in model.state_dict().items()]


def _renamed(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key)
    return key
