"""The vision model that published checkpoints only name: find it, read it, write ours in its words."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel

from integrations.llava._text import listed
from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from layerfuse.backbones import Backbone, create_backbone
from layerfuse.errors import InputError

from .content import Content
from .key_maps import BACKBONE, from_llava_hf
from .options import Options
from .tensors import CONFIG_FILE, StoredTensor, stored_model
from .timm_clip import clip_config_of_timm, clip_tensors_of_timm

__all__ = [
    "backbone_like",
    "check_tower",
    "find_tower",
    "split_tail",
    "tower_tensors",
    "vision_config_of",
    "vision_tensors_of",
    "whole_tower",
]

_log = logging.getLogger(__name__)
_DESCRIPTIONS = [CONFIG_FILE, "preprocessor_config.json", "processor_config.json"]
# Hub repositories may have both kinds; the second is looked for only where the first is missing.
_WEIGHTS = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)
# Of a model of text and vision, such as CLIP, what is not the vision model.
_OTHER_PARTS = re.compile(r"^(?:text_model\.|text_projection\.|visual_projection\.|logit_scale|logit_bias)")
_COMPUTED = re.compile(r"position_ids$")


def find_tower(name: str, *, beside: Path, weights: bool) -> Path:
    """Find a vision model: a folder as it is written, beside the checkpoint or in it, or one on the hub.

    Args:
        name: folder or hub name, as `mm_vision_tower` has it.
        beside: folder of the checkpoint.
        weights: whether its weights are needed, too.

    Returns:
        Its folder.

    Raises:
        ValueError: if it is in none of these places; the message says what to give.
    """
    for folder in (beside / name, beside.parent / name, Path(name)):
        if (folder / CONFIG_FILE).is_file():
            return folder
    try:
        folder = Path(snapshot_download(name, allow_patterns=_DESCRIPTIONS))
        if weights:
            for patterns in _WEIGHTS:
                folder = Path(snapshot_download(name, allow_patterns=[*_DESCRIPTIONS, *patterns]))
                if any((folder / pattern.replace("*", "")).is_file() for pattern in patterns):
                    break
    except (OSError, ValueError) as error:
        raise InputError(
            f"the vision model {name!r} is no folder beside the checkpoint and cannot be got from the hub "
            f"({type(error).__name__}). Give the folder of the model, with config.json, preprocessor_config.json and "
            "weights: --vision-tower FOLDER."
        ) from error
    return folder


def backbone_like(folder: Path, layers: tuple[int, ...]) -> Backbone:
    """Build the backbone that a folder's config describes, on the meta device.

    Args:
        folder: of a vision model, or of a model that has one.
        layers: to tap.

    Raises:
        ValueError: if layerfuse cannot tap such a model.
    """
    with torch.device("meta"):
        return create_backbone(f"transformers:{folder}", layers=layers, pretrained=False)


def tower_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Find the weights of the vision model in a folder, also of a CLIP that reads text, or of transformers' LLaVA.

    Returns:
        Under our names, as if no layer had been left out.

    Raises:
        FileNotFoundError: if it holds no weights.
        ValueError: if they cannot be read.
    """
    stored = stored_model(folder)
    if any("vision_tower." in name for name in stored):
        renamed = from_llava_hf(stored)
        return {name: tensor for name, tensor in renamed.items() if name.startswith(BACKBONE)}
    found = {}
    for name, tensor in stored.items():
        if not _OTHER_PARTS.match(name) and not _COMPUTED.search(name):
            found[BACKBONE + name.removeprefix("vision_model.")] = tensor
    return found


def vision_config_of(backbone: Backbone) -> dict[str, Any]:
    """Describe a backbone as transformers' config of its vision model, all its layers counted.

    Args:
        backbone: of the families transformers and timm (CLIP only).

    Raises:
        ValueError: if transformers has no such model, or the backbone takes another size than its model.
    """
    recipe = backbone.config["recipe"]
    if backbone.family == "timm":
        return clip_config_of_timm(backbone)
    if backbone.family != "transformers":
        raise InputError(
            f"the backbone is of family {backbone.family!r}, whose weights the other layouts have no names for; they "
            "hold vision models of transformers, and CLIP as timm has it."
        )
    config: dict[str, Any] = recipe["config"]
    own = config["image_size"]
    if list(backbone.image_size) != ([own, own] if isinstance(own, int) else list(own)):
        raise InputError(
            f"the backbone takes images of {backbone.image_size}, its vision model {own}; the other layouts know no "
            "such difference."
        )
    return dict(config)


def vision_tensors_of(backbone: Backbone, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Take a backbone's weights in transformers' words.

    Args:
        backbone: of the families transformers and timm (CLIP only).
        tensors: of the whole model, under our names.

    Returns:
        Those of the backbone, up to the deepest tapped layer.

    Raises:
        ValueError: if transformers has no such model.
    """
    vision_config_of(backbone)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}
    return clip_tensors_of_timm(own) if backbone.family == "timm" else own


def split_tail(
    model: FusedLlavaForConditionalGeneration, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Part the vision model's weights behind the deepest tapped layer from all others.

    Args:
        model: ours, which ends at that layer.
        tensors: under our names, the vision model whole.

    Returns:
        The others, and those behind.
    """
    behind = _shapes(vision_config_of(model.model.vision_tower.backbone)).keys() - model.state_dict().keys()
    tail = {name: tensor for name, tensor in tensors.items() if name in behind}
    return {name: tensor for name, tensor in tensors.items() if name not in tail}, tail


def whole_tower(content: Content, vision_config: Mapping[str, Any], options: Options) -> dict[str, StoredTensor]:
    """Put the vision model together again, the layers behind the deepest tapped one included.

    Args:
        content: has what is tapped, and perhaps the rest.
        vision_config: of the whole vision model.
        options: `vision_tower` has the rest, if the content does not.

    Raises:
        ValueError: if the rest is not to be had, or does not fit.
    """
    shapes = _shapes(vision_config)
    tapped = vision_tensors_of(content.backbone, content.tensors)
    found = {**content.tail, **tapped}
    name = options.vision_tower or (content.origin.config.get("mm_vision_tower") if content.origin else None)
    if shapes.keys() - found.keys() and name is not None:
        found = {**tower_tensors(find_tower(name, beside=content.folder, weights=True)), **found}
    missing, unexpected = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    misshapen = sorted(key for key in shapes.keys() & found.keys() if shapes[key] != found[key].shape)
    if missing or unexpected or misshapen:
        listing = listed([key.removeprefix(BACKBONE) for key in [*missing, *unexpected, *misshapen]])
        raise InputError(
            "the layout holds the whole vision model, but ours ends at its deepest tapped layer; missing, or of "
            f"another shape: {listing}. Give the vision model that it was trained with: --vision-tower FOLDER_OR_NAME"
        )
    return {key: found[key] for key in shapes}


def check_tower(name: str, tensors: Mapping[str, StoredTensor], *, beside: Path) -> None:
    """Compare a backbone with the vision model that the published code will read instead.

    Args:
        name: folder or hub name of that vision model.
        tensors: of the backbone, in transformers' words.
        beside: folder of the checkpoint.

    Raises:
        ValueError: if they differ: then the published code would compute something else, in silence.
    """
    try:
        named = tower_tensors(find_tower(name, beside=beside, weights=True))
    except (FileNotFoundError, ValueError):
        _log.warning("%s is not to be had here, so it was not checked that its weights are the model's", name)
        return
    other = [
        key.removeprefix(BACKBONE)
        for key, tensor in tensors.items()
        if key not in named
        or named[key].shape != tensor.shape
        or not torch.equal(named[key].read().to(tensor.dtype), tensor.read())
    ]
    if other:
        raise InputError(
            f"the vision model {name} is not the one in this model ({len(other)} weights differ: {', '.join(other[:3])}"
            ", …), and the published code reads the named one. Name the vision model it was trained with; one that was "
            "trained along cannot be given to the published code."
        )


def _shapes(vision_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model: Any = AutoModel.from_config(AutoConfig.for_model(**vision_config))
    return {BACKBONE + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
