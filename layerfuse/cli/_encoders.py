"""Backbones with a fuser behind them, for the commands that look at what it does: a trained encoder, or a new fuser."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from layerfuse.backbones import AnyBackbone, Backbone
from layerfuse.encoder import FusedEncoder
from layerfuse.errors import InputError, MissingFileError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import Fuser, create_fuser

from ._looking import backbone_with_layers, device_of, layer_choice, spread_at_most

__all__: list[str] = []

_USUAL = 6


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, its pictures, and the layers and the fuser of a model that is no encoder."""
    add = parser.add_argument
    add("model", help="the folder of a trained encoder (save_pretrained); or family:name, transformers:FOLDER")
    add("images", nargs="+", help="pictures, and folders of them")
    add("--layers", nargs="+", type=layer_choice, help=f"numbers, or shares such as 0.5 (default: {_USUAL}, spread)")
    add("--fuser", help="name of a fuser, which is new: it shows its start, nothing that was learned")


def tapped_model(arguments: argparse.Namespace) -> tuple[AnyBackbone, Fuser | None]:
    """Return the backbone or backbones with their taps, and the fuser behind them if there is one.

    Raises:
        ValueError: if arguments contradict a trained encoder, or a folder holds none.
    """
    if not _is_encoder(arguments.model):
        backbone = backbone_with_layers(arguments.model, arguments, arguments.layers or spread_at_most(_USUAL))
        if arguments.fuser is None:
            return backbone, None
        fuser = create_fuser(arguments.fuser, in_channels=backbone.fuser_channels, num_layers=len(backbone.layers))
        return backbone, fuser.eval().requires_grad_(False)
    given = [name for name in ("layers", "fuser", "image_size") if getattr(arguments, name) is not None]
    if given or arguments.pretrained == "false":
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "--pretrained false"
        raise InputError(f"{arguments.model} is a trained encoder with layers, fuser and size; leave {shown} out.")
    encoder = FusedEncoder.from_pretrained(arguments.model, device=device_of(arguments)).requires_grad_(False)
    return encoder.backbone, encoder.fuser.to("cpu", torch.float32)


def tapped_backbone(model: str, arguments: argparse.Namespace) -> AnyBackbone:
    """Return a backbone with all of its layers; of a trained encoder its backbones, with the layers that it taps.

    Raises:
        ValueError: if a folder holds no encoder.
    """
    if not _is_encoder(model):
        return backbone_with_layers(model, arguments)
    return FusedEncoder.from_pretrained(model, device=device_of(arguments)).requires_grad_(False).backbone


def about_model(arguments: argparse.Namespace, backbone: AnyBackbone, fuser: Fuser | None) -> list[str]:
    """Return what is looked at, in sentences."""
    lines = []
    for source, member in enumerate(backbone.members):
        own = [place for place, (which, _) in enumerate(backbone.taps) if which == source]
        layers: dict[Grid, list[str]] = {}
        for place in own:
            layers.setdefault(backbone.grids()[place], []).append(str(backbone.taps[place][1]))
        shown = "; ".join(f"{', '.join(those)} on a grid of {grid[0]}×{grid[1]}" for grid, those in layers.items())
        name = "" if len(backbone.members) == 1 else f"Backbone {source + 1}, a {type(member.model).__name__}: "
        lines.append(f"{name}Layers {shown}.")
    if arguments.fuser is not None:
        lines.append(f"The fuser {arguments.fuser} is new: what it makes of the maps was not learned.")
    elif fuser is not None:
        lines.append(f"The fuser is {fuser.name}, as it was trained.")
    return lines


def layer_titles(features: FeatureMaps | AnyBackbone) -> list[str]:
    """Return a title for each of the L maps; of several backbones with the number of its backbone, from 1."""
    if isinstance(features, AnyBackbone):
        taps: Sequence[tuple[int, int]] = features.taps if len(features.members) > 1 else ()
    else:
        taps = tuple(zip(features.sources, features.layers, strict=True)) if features.sources else ()
    if not taps:
        return [f"layer {layer}" for layer in features.layers]
    return [f"backbone {source + 1}, layer {layer}" for source, layer in taps]


def pictures_as_seen(images: torch.Tensor, backbone: AnyBackbone) -> list[list[np.ndarray]]:
    """Return each of B pictures as each backbone sees it: lists of (height, width, 3) uint8.

    ``images`` are (B, channels of all backbones, height, width), as `prepare` makes them.
    """
    parts = images.split([member.in_channels for member in backbone.members], dim=1)
    seen: list[list[np.ndarray]] = [[] for _ in images]
    for member, part in zip(backbone.members, parts, strict=True):
        height, width = member.image_size
        for pictures, pixels in zip(seen, _pixels(part[..., :height, :width], member), strict=True):
            pictures.append(pixels)
    return seen


def _pixels(images: torch.Tensor, backbone: Backbone) -> Iterator[np.ndarray]:
    mean, std = (
        torch.tensor(each).view(-1, 1, 1) for each in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    for image in images:
        pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        yield (pixels if pixels.shape[-1] == 3 else pixels[..., :1].expand(-1, -1, 3)).numpy()


def one_by_one(features: FeatureMaps) -> Iterator[FeatureMaps]:
    """Give the maps of each picture, B = 1."""
    for index in range(features.batch_size):
        yield features.map(lambda tokens, at=index: tokens[at : at + 1])  # type: ignore[misc]


def _is_encoder(model: str) -> bool:
    """Say whether a model is the folder of an encoder; one of something else, without a family, is refused."""
    folder = Path(model)
    if not folder.is_dir():
        if ":" not in model:
            raise MissingFileError(
                f"there is no folder {model}; give that of a trained encoder, or a backbone by family and name, "
                f"such as timm:{model} or transformers:{model}."
            )
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if isinstance(config, dict) and {"backbone", "fuser"} <= config.keys():
        return True
    raise InputError(
        f"{model} is a folder, and holds no encoder that save_pretrained wrote (config.json with 'backbone' and "
        f"'fuser'). A backbone's folder is named with its library: transformers:{model}, timm:local-dir:{model}. Of a "
        "larger model, save its FusedEncoder first: docs/analysis.md says how for integrations.llava."
    )
