"""Vision weights of OpenVLA (arXiv:2406.09246) and Prismatic (arXiv:2402.07865), which run two timm models together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from layerfuse.backbones._group import BackboneGroup
from layerfuse.backbones.base import Backbone
from layerfuse.errors import InputError, InvalidTypeError, MissingFileError
from layerfuse.weights import weight_differences

__all__ = ["load_prismatic_weights"]

# Under transformers the models are called featurizer and fused_featurizer, in Prismatic's own files by what they are.
_NAME = re.compile(r"(?:.*\.)?(?:(fused_featurizer|siglip_featurizer)|featurizer|dino_featurizer)\.(.+)")
# transformers renames what ends in "gamma" when it loads, so the published code calls it otherwise.
_SCALE = re.compile(r"\.(ls[12])\.scale_factor$")
# What stands behind the blocks of a timm model, and is cut off here.
_TAIL = re.compile(r"(norm|fc_norm|attn_pool|head)\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def load_prismatic_weights(group: BackboneGroup, weights: Mapping[str, torch.Tensor] | str | Path) -> None:
    """Load the vision weights of an OpenVLA or Prismatic checkpoint into a group of timm backbones, in place.

    The group's first backbone takes ``vision_backbone.featurizer.*``, its second ``vision_backbone.fused_featurizer.*``
    (in Prismatic's own files ``dino_featurizer.*`` and ``siglip_featurizer.*``). Blocks after the deepest tapped layer,
    the final norm and the head, which the backbones have not, are passed over; weights that are none of these models'
    (projector, language model), too.

    Args:
        group: built as the checkpoint's models are; both are tapped at their penultimate block, layer -2.
        weights: name -> tensor; or a safetensors file, or a folder of some.

    Raises:
        ValueError: if a weight is missing, unexpected, misshapen, without values (on the meta device) or given under
            two names, or there are other models than backbones; nothing is loaded then.
        FileNotFoundError: if there is no such file.
        TypeError: if something is no tensor, or ``weights`` are neither tensors nor files.
    """
    if not isinstance(weights, (Mapping, str, Path)):
        raise InvalidTypeError(f"weights are a {type(weights).__name__}; give names with tensors, or a file or folder.")
    found = _by_model(weights.items() if isinstance(weights, Mapping) else _stored(Path(weights)))
    if set(found) != set(range(len(group.members))):
        which = ", ".join(("featurizer", "fused_featurizer")[number] for number in sorted(found)) or "none"
        raise InputError(
            f"the checkpoint has weights of these vision models: {which}; the group has {len(group.members)} backbones."
            " Build it with one backbone for each, featurizer first."
        )
    fitting = []
    for number, member in enumerate(group.members):
        own = {name: tensor for name, tensor in found[number].items() if not _is_cut_off(name, member)}
        if faults := weight_differences(member.model.state_dict(), own):
            raise InputError(
                f"the weights of the checkpoint's vision model {number} do not fit the backbone {number}, a "
                f"{member.family!r} model: {faults}. Build the backbone from the checkpoint's timm model "
                "(timm_model_ids in its config) with its image size."
            )
        fitting.append({f"model.{name}": tensor for name, tensor in own.items()})
    for member, own in zip(group.members, fitting, strict=True):
        member.load_state_dict(own)


def _by_model(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[int, dict[str, torch.Tensor]]:
    """Sort the vision weights by model and timm's names; files may hold one twice, but no other name for it."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    names: dict[tuple[int, str], str] = {}
    for name, tensor in weights:
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise InvalidTypeError(f"{name} of the checkpoint is a {type(tensor).__name__}; give tensors.")
        if tensor.is_meta:
            raise InputError(f"{name} of the checkpoint is on the meta device, without values; load the checkpoint.")
        number, own = int(match[1] is not None), _SCALE.sub(r".\1.gamma", match[2])
        if names.setdefault((number, own), name) != name:
            raise InputError(
                f"the checkpoint has {names[number, own]} and {name}, which are weights of one model; give those of "
                "one vision backbone only."
            )
        found.setdefault(number, {})[own] = tensor
    return found


def _is_cut_off(name: str, member: Backbone) -> bool:
    block = _BLOCK.match(name)
    if block is None:
        return _TAIL.match(name) is not None
    return max(member.layers) <= int(block[1]) < member.num_blocks


def _stored(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the vision weights of a safetensors file or a folder of some; others are not read."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise MissingFileError(f"{path} is no safetensors file and no folder with one; give the checkpoint's.")
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                yield from ((name, stored.get_tensor(name)) for name in stored.keys() if _NAME.fullmatch(name))  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}); download it again.") from error
