"""The vision part of a recipe's model: one backbone or several, each with its layers, and the fuser behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from integrations.llava.config import BackboneChoice, ModelConfig
from layerfuse.backbones import AnyBackbone, Backbone, BackboneGroup, create_backbone
from layerfuse.errors import InputError
from layerfuse.fusers import FUSERS, Fuser, create_fuser, source_layers
from layerfuse.layers import resolve_layers

__all__ = ["build_vision", "numbered_layers"]


def build_vision(config: ModelConfig, llm_width: int | None, *, pretrained: bool) -> tuple[AnyBackbone, Fuser]:
    """Build the backbone, or several, and the fuser.

    Args:
        config: says which.
        llm_width: numbers of a language model's embedding, which a fuser may read as its condition.
        pretrained: load weights; else random ones.

    Raises:
        ValueError: if a name, a layer or an option is not possible.
    """
    backbone = _backbone(config, pretrained=pretrained)
    options = dict(config.fuser_options)
    # A fuser that is told what is asked about an image reads the language model's embeddings.
    if "condition_channels" in FUSERS.get(config.fuser).option_parameters():
        asked = options.setdefault("condition_channels", llm_width)
        if asked != llm_width:
            raise InputError(
                f"model.fuser_options sets condition_channels to {asked}, and the language model's embeddings, which "
                f"the fuser reads, have {llm_width} numbers; leave condition_channels out."
            )
    count = sum(map(len, _fused(config, backbone.members)))
    widths = list(backbone.map_channels[:count])
    # Forked, so that runs which differ in nothing but the fuser start from the same projector.
    with torch.random.fork_rng():
        fuser = create_fuser(
            config.fuser,
            in_channels=widths,
            num_layers=count,
            options=options,
        )
    return backbone, fuser


def numbered_layers(config: ModelConfig) -> ModelConfig:
    """Put numbers where the layers are left to the fuser (None); other configs stay as they are.

    Nothing is loaded: the backbones are built on the meta device, for their depths.

    Raises:
        ValueError: if the fuser's source names no layers for such a depth, or there is no such backbone.
    """
    if config.layers is not None:
        return config
    with torch.device("meta"):
        layers = _fused(config, _members(config, pretrained=False))
    return replace(config, layers=layers if config.several else layers[0])


def _backbone(config: ModelConfig, *, pretrained: bool) -> AnyBackbone:
    """The backbone, or several: first the maps of the fuser, then those that are only injected."""
    members = _members(config, pretrained=pretrained)
    if not config.several:
        return members[0]
    fused, injected, start = list[int](), list[int](), 0
    for layers, member in zip(_fused(config, members), members, strict=True):
        fused += range(start, start + len(layers))
        injected += range(start + len(layers), start + len(member.layers))
        start += len(member.layers)
    resample = None if config.resample == "none" else config.resample
    return BackboneGroup(
        members, resample=resample, grid=config.grid or None, order=[*fused, *injected] if injected else None
    )


def _members(config: ModelConfig, *, pretrained: bool) -> list[Backbone]:
    return [
        create_backbone(
            own.name,
            layers=partial(_tapped, config, own, place),
            pretrained=pretrained,
            image_size=own.image_size,
            options=own.options,
        )
        for place, own in enumerate(config.backbones)
    ]


def _fused(config: ModelConfig, backbones: Sequence[Backbone]) -> tuple[tuple[int, ...], ...]:
    """Layers that the fuser reads of each backbone."""
    return tuple(
        _read_by_fuser(config, own, backbone.num_blocks)
        for own, backbone in zip(config.backbones, backbones, strict=True)
    )


def _read_by_fuser(config: ModelConfig, own: BackboneChoice, depth: int) -> tuple[int, ...]:
    """Layers that the fuser reads of a backbone of this depth."""
    if own.layers is not None:
        return resolve_layers(own.layers, depth)
    published = source_layers(FUSERS.get(config.fuser), depth, config.fuser_options)
    if published is None:
        raise InputError(
            f"model.layers is empty, so the fuser's source decides, but {config.fuser!r} has no published choice of "
            f"layers for {depth} blocks; name them, for example model.layers: [3, 8, -2]."
        )
    return published


def _tapped(config: ModelConfig, own: BackboneChoice, place: int, depth: int) -> tuple[int, ...]:
    """Layers of one of the backbones, of this depth: the fuser's, then those that are only injected."""
    taps = [tap for pair in config.injection.pairs for tap in pair[:-1]]
    # A bare number names a layer of the only backbone, or one that the fuser's layers show the backbone of.
    pairs = [
        tap if isinstance(tap, tuple) else (0, tap) for tap in taps if isinstance(tap, tuple) or not config.several
    ]
    injected = [resolve_layers(layer, depth)[0] for source, layer in pairs if source == place]
    return tuple(dict.fromkeys((*_read_by_fuser(config, own, depth), *injected)))
