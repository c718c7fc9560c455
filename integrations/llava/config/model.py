"""The model part of a recipe: backbones, fuser, injection, language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from layerfuse.errors import InputError

from .limits import Checked, Count

__all__ = ["OF_CHECKPOINT", "BackboneChoice", "InjectionConfig", "ModelConfig"]

OF_CHECKPOINT = ("checkpoint", "checkpoint_digest", "checkpoint_base", "vision_tower")
"""Keys of the model part that only say which checkpoint a run goes on from."""


@dataclass(frozen=True)
class InjectionConfig(Checked):
    """Layer injection: maps that are added inside the language model, as in DeepStack (arXiv:2406.04334), Qwen3-VL.

    Attributes:
        pairs: (tapped layer, decoder layer) each: layers of the backbone as in `ModelConfig.layers`, decoder layers
            counted from 0; several tapped layers, the decoder layer last, for a merger that is a fuser. A tapped layer
            of several backbones is (backbone counted from 0, layer); its number alone does where the fuser reads that
            layer of one of them only. Without any pairs, nothing is injected.
        merger: `mlp`, `pixel_shuffle_mlp`, or the name of a fuser, which gets an MLP behind it.
        merger_options: the merger's own arguments, such as {"window": 2}.
        when: whether tokens are added to what the decoder layer reads ("before") or puts out ("after").
    """

    pairs: tuple[tuple[int | tuple[int, ...], ...], ...] = ()
    merger: str = "mlp"
    merger_options: dict[str, Any] = field(default_factory=dict)
    when: Literal["before", "after"] = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        for pair in self.pairs:
            if len(pair) < 2 or not isinstance(pair[-1], int) or pair[-1] < 0:
                raise InputError(
                    f"pairs has {list(pair)}; give [layer of the backbone, decoder layer] each, decoder layers counted "
                    "from 0, such as [[9, 0], [17, 1]]."
                )
            for tap in pair[:-1]:
                if isinstance(tap, tuple) and (len(tap) != 2 or tap[0] < 0):
                    raise InputError(
                        f"pairs has {list(tap)} for a layer of one of several backbones; give [backbone, layer], "
                        "backbones counted from 0, such as [[[1, 9], 0]]."
                    )
        if twice := [pair for pair in self.pairs if self.pairs.count(pair) > 1]:
            raise InputError(f"pairs names {list(twice[0])} twice; name each pair once.")


class BackboneChoice(NamedTuple):
    """One of the backbones that a recipe names.

    Attributes:
        name: with its family, as `layerfuse.create_backbone` takes it.
        layers: the fuser's; None for those that its source taps.
        image_size: pixels, one edge; None for the backbone's own.
        options: arguments for the library's own constructor.
    """

    name: str
    layers: tuple[int, ...] | None
    image_size: int | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Parts of the model, by name and options.

    Several backbones are a list of names in `backbone`, with a list of layers for each in `layers`; `family`,
    `image_size` and `backbone_options` are one value for all of them, or a list.

    Or `checkpoint` names a whole model to go on from; of the other keys, then only those of `OF_CHECKPOINT` and
    `attention` may be given.

    Attributes:
        checkpoint: folder of a model to go on from, in any layout that `convert` reads; its tokenizer, template and
            preprocessing come along. Empty: the parts below are put together.
        checkpoint_digest: of its weights, which a run notes, so that it never goes on from others.
        checkpoint_base: folder or hub name of the model that the adapters of a LoRA checkpoint of LLaVA were trained
            on; empty for the one that its files name.
        vision_tower: folder or hub name of the vision model, where the checkpoint lacks it or its name.
        family: backbone family of layerfuse: timm, open_clip, transformers, …
        backbone: the backbone's name in that library, or a folder.
        layers: tapped layers in the order the fuser wants them (0 = embeddings, -2 = penultimate block); None for
            those that the fuser's source taps of a backbone of this depth, as in `layerfuse.create_encoder`.
        image_size: pixels, one edge; None for the backbone's own.
        backbone_options: arguments for the library's own constructor.
        backbone_pretrained: load the library's weights; False gives random ones.
        resample: how the maps of several backbones come to one grid; "none" for a fuser that takes each on its own.
        grid: (H, W) of that grid, in patches; empty for that of the first backbone.
        fuser: name of the fuser.
        fuser_options: the fuser's own arguments.
        projector: kind of projector.
        injection: layers that are also added inside the language model; its mergers are part of the projector.
        image_layout: "fixed", one picture of the backbone's size; "anyres", an overview and tiles, as in LLaVA-NeXT,
            where each row of tokens ends with a newline, which is part of the projector.
        pinpoints: (height, width) in pixels of the canvases that "anyres" scales images into, in whole tiles, which
            have the backbone's size; without any, LLaVA-NeXT's: of tiles 1 x 2, 2 x 1, 2 x 2, 3 x 1, 1 x 3.
        llm: folder or hub name of a causal language model.
        llm_pretrained: load its weights; False builds `llm_architecture` with random ones.
        llm_architecture: transformers' config of the language model (`model_type`, `hidden_size`, …). Used where
            nothing can be loaded: for random weights, and by a dry run that does not reach the hub.
        tokenizer: folder or hub name of the tokenizer; None for the language model's own.
        attention: transformers' name of the attention implementation.
    """

    checkpoint: str = ""
    checkpoint_digest: str = ""
    checkpoint_base: str = ""
    vision_tower: str = ""
    family: str | tuple[str, ...] = "timm"
    backbone: str | tuple[str, ...] = "vit_large_patch14_clip_quickgelu_336.openai"
    layers: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = (-22, -17, -12, -7, -2)
    image_size: Count | tuple[Count | None, ...] | None = None
    backbone_options: dict[str, Any] | tuple[dict[str, Any], ...] = field(default_factory=dict)
    backbone_pretrained: bool = True
    resample: Literal["bilinear", "bicubic", "nearest", "none"] = "bilinear"
    grid: tuple[Count, ...] = ()
    fuser: str = "mmfuser"
    fuser_options: dict[str, Any] = field(default_factory=dict)
    projector: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    image_layout: Literal["fixed", "anyres"] = "fixed"
    pinpoints: tuple[tuple[int, ...], ...] = ()
    llm: str = "lmsys/vicuna-7b-v1.5"
    llm_pretrained: bool = True
    llm_architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_checkpoint()
        self._check_lists()
        for layers in (own.layers for own in self.backbones if own.layers is not None):
            twice = sorted({layer for layer in layers if layers.count(layer) > 1})
            if twice or not layers:
                raise InputError(
                    f"layers={layers} names {', '.join(map(str, twice))} twice; name each layer once."
                    if twice
                    else "layers is empty; name at least one layer."
                )
        if self.grid and (not self.several or len(self.grid) != 2 or self.resample == "none"):
            raise InputError(
                f"grid={list(self.grid)} is (H, W), in patches, to which the maps of several backbones are resampled; "
                "leave it out for one backbone and with resample: none."
            )
        if wrong := [own for own in self.pinpoints if len(own) != 2 or min(own) < 1]:
            raise InputError(
                f"pinpoints has {list(wrong[0])}; give a list of [height, width] in pixels, such as [[336, 672]]."
            )
        if self.pinpoints and self.image_layout != "anyres":
            raise InputError(
                f"pinpoints is given, and image_layout is {self.image_layout!r}, which cuts no tiles; set image_layout "
                "to 'anyres', or leave pinpoints out."
            )

    def _check_checkpoint(self) -> None:
        default = {
            item.name: item.default_factory() if callable(item.default_factory) else item.default
            for item in fields(self)
        }
        given = [name for name, value in default.items() if getattr(self, name) != value]
        if self.checkpoint and (other := [name for name in given if name not in (*OF_CHECKPOINT, "attention")]):
            raise InputError(
                f"checkpoint is {self.checkpoint!r}, a model that is taken as it is, and {', '.join(other)} would "
                "change it; leave one or the other out."
            )
        if not self.checkpoint and (alone := [name for name in given if name in OF_CHECKPOINT]):
            raise InputError(f"{', '.join(alone)} belongs to a checkpoint, and none is named; set model.checkpoint.")

    def _check_lists(self) -> None:
        if self.backbone == ():
            raise InputError("backbone is an empty list; name one backbone, or list several.")
        count = len(self.backbone) if isinstance(self.backbone, tuple) else 0
        nested = [isinstance(layers, tuple) for layers in self.layers or ()]
        if count and self.layers is not None and not (all(nested) and len(nested) == count):
            raise InputError(
                f"layers={self.layers} are for {count} backbones; give a list of layers for each, such as "
                "[[3, 8, -2], [-2]]."
            )
        if not count and any(nested):
            raise InputError(f"layers={self.layers} are for several backbones, and backbone names one; list them, too.")
        named = f"{count} backbones" if count else "one backbone"
        for name in ("family", "image_size", "backbone_options"):
            value = getattr(self, name)
            if isinstance(value, tuple) and (not count or len(value) != count):
                raise InputError(
                    f"{name} has {len(value)} entries for {named} in `backbone`; give one value, or a "
                    "list of one for each of several backbones."
                )

    @property
    def several(self) -> bool:
        """Whether several backbones are named."""
        return isinstance(self.backbone, tuple)

    @property
    def backbones(self) -> tuple[BackboneChoice, ...]:
        """The backbones that are named: one, or several."""
        names: Any = self.backbone if isinstance(self.backbone, tuple) else (self.backbone,)
        layers: Any = self.layers if self.several and self.layers is not None else (self.layers,) * len(names)
        rest = [
            value if isinstance(value, tuple) else (value,) * len(names)
            for value in (self.family, self.image_size, self.backbone_options)
        ]
        return tuple(
            BackboneChoice(f"{family}:{name}", own, size, options)
            for name, own, family, size, options in zip(names, layers, *rest, strict=True)
        )
