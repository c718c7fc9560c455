"""Layer injection (the DeepStack family, arXiv:2406.04334): tapped layers are added inside the language model.

    tap ── merger ──► added to the hidden states at the images' positions, before or after the named decoder layer

The additions stand around a decoder layer and outside of what activation checkpointing repeats, so that a repeated
layer reads what it read the first time, whatever was computed since. They are made where image features come in: in
training, and in the first step of `generate`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from integrations.llava.config import InjectionConfig, decode
from layerfuse.backbones import AnyBackbone
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import Fuser
from layerfuse.layers import resolve_layers
from layerfuse.registry import unknown_name_message

from .mergers import Merger, create_merger

__all__ = [
    "InjectedFeatures",
    "LayerInjection",
    "current_call",
    "decoder_layers",
    "fitting_injection",
    "injecting",
    "injection_settings",
    "leading_maps",
    "prepare_layers",
    "resolved_injection",
]


@dataclass
class InjectedFeatures(BaseModelOutputWithPooling):
    """Image features with those that go into the language model's layers, under transformers' name for them.

    Attributes:
        deepstack_features: per pair of `InjectionConfig.pairs`, one tensor (N, D) an image.
    """

    deepstack_features: list[list[torch.Tensor]] | None = None


class LayerInjection(nn.Module):
    """The mergers, one for each pair of taps and decoder layer.

    Args:
        settings: its taps are layer numbers >= 0, of several backbones (backbone, layer).
        backbone: has these taps.
        out_channels: width D of the language model.
    """

    def __init__(self, settings: InjectionConfig, backbone: AnyBackbone, out_channels: int) -> None:
        super().__init__()
        self.settings = settings
        build = functools.partial(create_merger, out_channels=out_channels, options=settings.merger_options)
        widths = [[backbone.map_channels[place] for place in own] for own in _places(settings, backbone.taps)]
        self.mergers = nn.ModuleList(
            build(settings.merger, in_channels=own[0] if len(set(own)) == 1 else own, num_layers=len(own))
            for own in widths
        )

    def forward(self, features: FeatureMaps) -> list[torch.Tensor]:
        """Merge the taps among the maps: one (B, N, D) for each pair."""
        taps = tuple(zip(features.sources or (0,) * len(features), features.layers, strict=True))
        places = _places(self.settings, taps)
        return [merger(features.take(own)) for merger, own in zip(self.mergers, places, strict=True)]

    def grids(self, backbone: AnyBackbone) -> list[Grid]:
        """Return the grid of each merger's maps; a ValueError if one has several."""
        grids = backbone.grids()
        read = [{grids[place] for place in own} for own in _places(self.settings, backbone.taps)]
        for (*taps, _), own in zip(self.settings.pairs, read, strict=True):
            if len(own) > 1:
                raise InputError(
                    f"injection.pairs joins the taps {taps}, whose maps lie on several grids: {sorted(own)}; bring the "
                    "backbones' maps to one grid (model.resample), or inject each tap on its own."
                )
        return [own.pop() for own in read]


def _places(settings: InjectionConfig, taps: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Find, for each pair, its taps among (backbone, layer) taps."""
    known: dict[Any, int] = {tap: place for place, tap in enumerate(taps)}
    return [[known[(0, tap) if isinstance(tap, int) else tap] for tap in pair[:-1]] for pair in settings.pairs]


def injection_settings(described: Mapping[str, Any] | None) -> InjectionConfig | None:
    """Read the fields of an `InjectionConfig` as a checkpoint's config holds them; None where nothing is injected.

    Raises:
        ValueError: if they are not those fields, or hold what an `InjectionConfig` cannot.
    """
    if not described:
        return None
    known = [field.name for field in fields(InjectionConfig)]
    if not isinstance(described, Mapping):
        raise InputError(f"injection of the config is {described!r}; give its fields, {', '.join(known)}, or null.")
    if unknown := sorted(described.keys() - set(known)):
        raise InputError(unknown_name_message("field of the config's injection", unknown[0], known))
    pairs = described.get("pairs")
    if not _holds_numbers(pairs):
        raise InputError(
            f"injection.pairs of the config is {pairs!r}; give [layer of the backbone, decoder layer] each, such as "
            "[[9, 0], [17, 1]], or injection null for a model that injects nothing."
        )
    settings: InjectionConfig = decode(InjectionConfig, described, "injection")
    return settings if settings.pairs else None


def _holds_numbers(pairs: Any) -> bool:
    """Tell whether a value is a list of lists of whole numbers, or of pairs of them where a backbone is named."""
    lists = isinstance(pairs, list | tuple) and all(isinstance(pair, list | tuple) for pair in pairs)
    taps = [tap for pair in pairs for tap in pair] if lists else []
    numbers = [number for tap in taps for number in (tap if isinstance(tap, list | tuple) else [tap])]
    return lists and all(type(number) is int for number in numbers)


def resolved_injection(
    settings: InjectionConfig | None, backbone: AnyBackbone, fuser: Fuser, language_model: PreTrainedModel
) -> InjectionConfig | None:
    """Check that injection fits a language model, and the rest as `fitting_injection`; None if nothing is injected."""
    if settings is None or not settings.pairs:
        return None
    return fitting_injection(settings, backbone, fuser, len(decoder_layers(language_model)))


def fitting_injection(settings: InjectionConfig, backbone: AnyBackbone, fuser: Fuser, depth: int) -> InjectionConfig:
    """Give taps their numbers from 0 on, and check that everything fits.

    Args:
        settings: taps among `backbone.taps`; a bare number of several backbones is of the one that taps that layer.
        backbone: taps the fuser's layers first, then those that are only injected.
        fuser: of the input; mergers have to give as many tokens.
        depth: number of decoder layers.

    Raises:
        ValueError: if a layer is none of the backbone's or language model's, or a merger's tokens are not the fuser's.
    """
    single = len(backbone.members) == 1
    pairs = [(*_resolved(pair[:-1], backbone), pair[-1]) for pair in settings.pairs]
    injected = tuple(dict.fromkeys(tap for pair in pairs for tap in pair[:-1]))
    taps = backbone.layers if single else backbone.taps
    unread = set(taps[fuser.num_layers :]) - set(injected)
    fits = fuser.in_channels == backbone.map_channels[: fuser.num_layers] and fuser.num_layers <= len(taps)
    if not fits or unread or set(injected) - set(taps):
        raise InputError(
            f"the backbone taps layers {taps} of width {backbone.fuser_channels}, the fuser {fuser.name!r} reads "
            f"the first {fuser.num_layers} of widths {fuser.in_channels}, and layers {injected} are injected; tap the "
            "fuser's layers, then those that are only injected, and no other."
        )
    if outside := sorted({pair[-1] for pair in pairs if pair[-1] >= depth}):
        raise InputError(
            f"injection.pairs name decoder layer {outside[0]}, but the language model has {depth}, counted from 0: "
            f"0..{depth - 1}."
        )
    resolved = replace(settings, pairs=tuple(pairs))
    grids = backbone.grids()
    with torch.device("meta"):
        injection = LayerInjection(resolved, backbone, 1)
    read = grids[: fuser.num_layers]
    needed, wanted = fuser.num_tokens(read), (fuser.out_grid(read), fuser.extra_tokens(read))
    for merger, grid in zip(injection.mergers, injection.grids(backbone), strict=True):
        assert isinstance(merger, Merger)
        if (given := merger.num_tokens(grid)) != needed:
            raise InputError(
                f"injection's merger {settings.merger!r} gives {given} tokens an image, but the fuser {fuser.name!r} "
                f"gives {needed}, and injected tokens are added to these; take a merger and a fuser of equally many."
            )
        if (placed := merger.placement(grid)) != wanted:
            raise InputError(
                f"injection's merger {settings.merger!r} gives tokens of the grid {placed[0]} (in front and behind: "
                f"{tuple(placed[1])}), the fuser {fuser.name!r} of {wanted[0]} ({tuple(wanted[1])}), so that they "
                "would be added to tokens of other places; take a merger and a fuser of one grid."
            )
    return resolved


def _resolved(taps: Sequence[Any], backbone: AnyBackbone) -> list[Any]:
    """Number taps from 0 on: layers of one backbone; (backbone, layer) of several, each named once."""
    members = backbone.members
    if len(members) == 1 and all(isinstance(tap, int) for tap in taps):
        return list(resolve_layers(taps, members[0].num_blocks))
    resolved: list[Any] = []
    for tap in taps:
        if isinstance(tap, int):
            depths = [member.num_blocks for member in members]
            numbers = [tap + depth + 1 if tap < 0 else tap for depth in depths]
            found = [each for each in enumerate(numbers) if each in backbone.taps]
            if len(found) != 1:
                raise InputError(
                    f"injection.pairs names layer {tap}, which {len(found) or 'none'} of the {len(members)} backbones "
                    "tap; say of which backbone it is, counted from 0: [backbone, layer], such as [1, 9]."
                )
            resolved += found
            continue
        source, layer = tap
        if not 0 <= source < len(members):
            raise InputError(
                f"injection.pairs names backbone {source} in {list(tap)}; there are {len(members)}, counted from 0."
            )
        resolved.append((source, resolve_layers(layer, members[source].num_blocks)[0]))
    if twice := [tap for tap in resolved if resolved.count(tap) > 1]:
        raise InputError(f"injection.pairs reads the tap {twice[0]} twice in one pair; name each once.")
    return resolved if len(members) > 1 else [layer for _, layer in resolved]


def leading_maps(features: FeatureMaps, count: int) -> FeatureMaps:
    """Return the first maps, which are the fuser's; the rest is only injected."""
    return features if len(features) == count else features.take(range(count))


@dataclass
class InjectionCall:
    """One forward pass of a model with injection.

    Attributes:
        settings: of the model.
        features: as in `InjectedFeatures`; None as long as there are no images.
        mask: (B, T), where images are.
    """

    settings: InjectionConfig
    features: Sequence[Sequence[torch.Tensor]] | None = None
    mask: torch.Tensor | None = None

    def add(self, layer: int, when: str, hidden: torch.Tensor) -> torch.Tensor:
        """Add to the hidden states (B, T, D) before or after a decoder layer what is injected there."""
        if self.features is None or when != self.settings.when:
            return hidden
        for pair, images in zip(self.settings.pairs, self.features, strict=True):
            if pair[-1] == layer:
                assert self.mask is not None
                tokens = torch.cat(list(images)).to(hidden.device, hidden.dtype)
                mask = self.mask.to(hidden.device).unsqueeze(-1)
                hidden = hidden + torch.zeros_like(hidden).masked_scatter(mask, tokens)
        return hidden


class _ThreadCall(threading.local):
    """The pass that is under way in a thread: replicas of a model, which share nothing else, each have their own."""

    current: InjectionCall | None = None


_THREAD = _ThreadCall()


def current_call() -> InjectionCall | None:
    """Return the forward pass with injection that this thread is in."""
    return _THREAD.current


@contextmanager
def injecting(settings: InjectionConfig, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let the decoder layers of a forward pass add image features.

    Args:
        settings: of the model.
        arguments: of the pass; `mm_encoder_outputs` holds the features, or else they come up in the pass.

    Raises:
        ValueError: if encoded features lack those that are injected.
    """
    encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
    features = None if encoded is None else getattr(encoded, "deepstack_features", None)
    if encoded is not None and features is None:
        raise InputError(
            "the image features that were given have no deepstack_features, which this model adds to its language "
            "model's layers; give what its get_image_features returns."
        )
    outer, _THREAD.current = _THREAD.current, InjectionCall(settings, features)
    try:
        yield
    finally:
        _THREAD.current = outer


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """Find the list of a language model's decoder layers; a ValueError if there is none of its config's length."""
    depth = getattr(language_model.config.get_text_config(), "num_hidden_layers", None)
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise InputError(
        f"{type(language_model).__name__} has no list of {depth} decoder layers, so that nothing can be injected; take "
        "a language model of blocks in a list, such as Llama's, or leave injection out."
    )


def prepare_layers(language_model: PreTrainedModel) -> None:
    """Let a language model's decoder layers ask, when they are called, what is injected around them.

    They become instances of a class derived from their own, all of them: wrappers find layers by their class. Without
    a pass with injection under way they compute what they did.
    """
    for index, layer in enumerate(decoder_layers(language_model)):
        kind: Any = type(layer)
        if not getattr(kind, "asks_for_injection", False):
            layer.__class__ = _asking(kind)
        layer.decoder_index = index  # type: ignore[assignment]


@functools.cache
def _asking(kind: Any) -> type[nn.Module]:
    """Derive the class; its name stays, by which device maps and FSDP know what not to take apart."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        under_way = current_call()
        if under_way is None or under_way.features is None:
            return kind.__call__(self, *args, **kwargs)
        layer = self.decoder_index
        if args:
            args = (under_way.add(layer, "before", args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = under_way.add(layer, "before", kwargs["hidden_states"])
        output = kind.__call__(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (under_way.add(layer, "after", output[0]), *output[1:])
        return under_way.add(layer, "after", output)

    # Copies and pickles know the class by that which it is derived from.
    members = {
        "__call__": call,
        "__reduce_ex__": lambda self, _: (_empty, (kind,), self.__dict__),
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "asks_for_injection": True,
    }
    return type(kind.__name__, (kind,), members)


def _empty(kind: Any) -> nn.Module:
    return object.__new__(_asking(kind))
