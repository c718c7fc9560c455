"""Backbones from any ``nn.Module``: the user says where the blocks are and how the tokens lie.

An instance can be tapped as it is. To save and load such a backbone, its class is registered under a name::

    @layerfuse.backbones.MODULES.register("my-vit")
    class MyViT(nn.Module):
        def load_pretrained(self) -> None: ...  # where there are weights

    create_backbone("module:my-vit", layers=(2, -1),
                    options={"embed_dim": 64, "num_prefix_tokens": 1, "patch_size": 14, "image_size": 224,
                             "arguments": {"depth": 6}})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from layerfuse.backbones.base import BACKBONES, Backbone, BackboneFacts, Stage, as_pair
from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.layers import LayerChoice
from layerfuse.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from layerfuse.registry import Registry, unknown_name_message
from layerfuse.taps import find_blocks

__all__ = ["MODULES", "ModuleBackbone"]

# A config names a registered class rather than an import path: a downloaded config must not choose what code runs.
MODULES: Registry[nn.Module] = Registry("module", group="layerfuse.modules")

_NEEDED = ("embed_dim", "num_prefix_tokens", "patch_size", "image_size")
_OPTIONS = (
    *_NEEDED,
    *("blocks", "tail", "any_size", "in_channels", "stages", "size_step", "returns_pairs", "copy_maps", "arguments"),
)
_STAGE_KEYS = tuple(field.name for field in fields(Stage))


@BACKBONES.register("module")
class ModuleBackbone(Backbone):
    """A module whose blocks take and return tokens, and which is called with images (B, C, height, width).

    Tokens are (B, P + N, C), or as ``stages`` say.

    Arguments and errors that are not named here are those of `Backbone` and `BackboneFacts`.

    Args:
        patch_size: edge or (height, width), in pixels.
        image_size: native edge or (height, width), in pixels.
        blocks: found by structure if None and there is just one list.
        stages: a mapping with the fields of `Stage` for each: ``{"num_blocks": 2, "embed_dim": 96, "stride": 4}``, and
            ``layout`` and ``unrolled`` where tokens are not (B, P + N, C); a stride is an edge or (height, width).
        size_step: edge or (height, width), in pixels.
        preprocessing: ImageNet's statistics and a centre crop if None.

    Raises:
        ValueError: if the block list or a path in ``tail`` is not there, or a stage is no such mapping.
    """

    family = "module"

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerChoice,
        embed_dim: int,
        num_prefix_tokens: int,
        patch_size: int | Sequence[int],
        image_size: int | Sequence[int],
        blocks: str | None = None,
        tail: Sequence[str] = (),
        any_size: bool = False,
        in_channels: int | None = None,
        stages: Sequence[Mapping[str, Any]] = (),
        size_step: int | Sequence[int] | None = None,
        returns_pairs: bool = False,
        copy_maps: bool = False,
        preprocessing: Preprocessing | None = None,
        _recipe: Mapping[str, Any] | None = None,
    ) -> None:
        size = as_pair(image_size)
        facts = BackboneFacts(
            blocks=blocks if blocks is not None else find_blocks(model),
            embed_dim=embed_dim,
            num_prefix_tokens=num_prefix_tokens,
            patch_size=as_pair(patch_size),
            image_size=size,
            any_size=any_size,
            preprocessing=preprocessing or Preprocessing(size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD),
            in_channels=in_channels,
            tail=tuple(tail),
            stages=tuple(map(_as_stage, stages)),
            size_step=None if size_step is None else as_pair(size_step),
            returns_pairs=returns_pairs,
        )
        super().__init__(model, layers=layers, facts=facts, recipe=_recipe)
        self.copy_maps = copy_maps

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        layers: LayerChoice,
        pretrained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> ModuleBackbone:
        """Build a module by the name it has in `MODULES`, as `Backbone.from_name` says.

        ``pretrained`` calls the module's method ``load_pretrained()``, which loads weights into it. ``options`` are
        ``embed_dim``, ``num_prefix_tokens``, ``patch_size``, ``image_size`` (which the argument of that name replaces),
        and optionally ``blocks``, ``tail``, ``any_size``, ``in_channels``, ``stages``, ``size_step``,
        ``returns_pairs``, ``copy_maps`` as for the class, and ``arguments``, a mapping for the module's constructor.
        """
        given = dict(options or {})
        if image_size is not None:
            given["image_size"] = image_size
        return cls._build(name, given, layers=layers, pretrained=pretrained)

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any], *, layers: Sequence[int]) -> ModuleBackbone:
        """Build a recipe as `Backbone.rebuild` says."""
        return cls._build(recipe["name"], recipe["options"], layers=layers, pretrained=False)

    @classmethod
    def list_names(cls) -> list[str]:
        """Return the names in `MODULES`."""
        return list(MODULES)

    @classmethod
    def _build(cls, name: str, options: Mapping[str, Any], *, layers: LayerChoice, pretrained: bool) -> ModuleBackbone:
        for key in options:
            if key not in _OPTIONS:
                raise InputError(unknown_name_message("module backbone option", key, _OPTIONS))
        missing = [key for key in _NEEDED if key not in options]
        if missing:
            raise InputError(f"module {name!r} needs the options {', '.join(_NEEDED)}; missing: {', '.join(missing)}.")
        model: Any = MODULES.get(name)(**options.get("arguments", {}))
        if pretrained and not hasattr(model, "load_pretrained"):
            raise InputError(
                f"module {name!r} has no pretrained weights that layerfuse knows, because {type(model).__name__} has "
                "no method load_pretrained(). Write one, pass pretrained=False, or hand over a module with weights."
            )
        if pretrained:
            model.load_pretrained()
        given = {key: value for key, value in options.items() if key != "arguments"}
        return cls(model, layers=layers, _recipe={"name": name, "options": dict(options)}, **given)


def _as_stage(given: Mapping[str, Any]) -> Stage:
    if not isinstance(given, Mapping):
        raise InvalidTypeError(f"a stage is a {type(given).__name__}; give a mapping with {', '.join(_STAGE_KEYS)}.")
    for key in given:
        if key not in _STAGE_KEYS:
            raise InputError(unknown_name_message("field of a stage", key, _STAGE_KEYS))
    if missing := [key for key in ("num_blocks", "embed_dim", "stride") if key not in given]:
        raise InputError(f"a stage needs num_blocks, embed_dim and stride; missing: {', '.join(missing)}.")
    unrolled = tuple(map(as_pair, given.get("unrolled", ())))
    return Stage(**{**given, "stride": as_pair(given["stride"]), "unrolled": unrolled})
