"""The base class of backbones: choose layers, cut off the rest, tap, split prefix tokens, return feature maps.

A family (timm, open_clip, transformers, module) only states facts about its models (`BackboneFacts`) and how to build
one; docs/write_a_backbone.md shows a family of one's own. The model is cut after the deepest tapped block and always
runs through its own ``forward``: hooks on a shorter model need no special case for ``torch.compile``, gradient
checkpointing, FSDP2 and offloading, save the unused blocks' compute, and leave no parameter without gradient.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import nn

from layerfuse._block_lists import cut_submodules
from layerfuse._block_stages import Blocks
from layerfuse.backbones._any_backbone import AnyBackbone
from layerfuse.backbones._facts import BackboneFacts, as_pair, checked_multiple, grid_of
from layerfuse.backbones._image_checks import check_images, check_tokens, find_patch_embedding
from layerfuse.backbones._naflex import as_patches, each_picture
from layerfuse.backbones._stages import Stage, stages_of_layers
from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.layers import LayerChoice, resolve_layers
from layerfuse.preprocessing import PatchBatch, Preprocessing, holds_patches
from layerfuse.registry import Registry
from layerfuse.taps import BlockTaps, as_features

__all__ = ["BACKBONES", "Backbone", "BackboneFacts", "Stage", "as_pair", "checked_multiple"]


class Backbone(AnyBackbone):
    """A Vision Transformer of which some layers are tapped, and which ends after the deepest of them.

    The model that is handed over is changed: the blocks after the deepest tapped layer, the final norm and the pooling
    head are removed. `layerfuse.tap` leaves a model whole instead.

    A family sets ``family`` and implements `from_name` and `rebuild`; where its models need it, it replaces
    `find_model`, `cut_tail`, `run` and `list_names`.

    Args:
        model: of the family's library.
        layers: layer numbers or shares of the depth, in the order wanted; see `layerfuse.resolve_layers`.
        facts: about this model.
        recipe: JSON-able arguments from which `rebuild` makes the same architecture again; None if nothing can, and the
            backbone cannot be saved.

    Attributes:
        family: name under which the class is registered in `BACKBONES`.
        library: package whose models are this family's, so that one that is handed over is known by its class; "" if
            the family has to be named.
        model: the shortened model.
        layers: resolved layer numbers (>= 0), in the order asked.
        num_blocks: number of blocks before shortening.
        embed_dim: C, of the first stage; this and ``patch_size``, ``num_prefix_tokens``, ``image_size``, ``any_size``,
            ``in_channels``, ``patch_layout`` and ``preprocessing`` (which may be replaced) are those of
            `BackboneFacts`.
        copy_maps: copy each tensor when it is tapped, for a model that changes its hidden states in place; without it
            such a change is an error. May be set.

    Raises:
        ValueError: if a layer is out of range or repeated, or the entries of the block list are not one block each.
    """

    family: ClassVar[str]
    library: ClassVar[str] = ""

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerChoice,
        facts: BackboneFacts,
        recipe: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        blocks = Blocks(model, facts.blocks)
        self.model = model
        self.num_blocks = len(blocks)
        self.layers = resolve_layers(layers, self.num_blocks)
        stages = facts.stages or (Stage(self.num_blocks, facts.embed_dim, facts.patch_size),)
        of_layer = stages_of_layers(stages, self.num_blocks)
        self._stages = tuple(of_layer[layer] for layer in self.layers)
        self.embed_dim = facts.embed_dim
        self.patch_size = facts.patch_size
        self.num_prefix_tokens = facts.num_prefix_tokens
        self.image_size = facts.image_size
        self.any_size = facts.any_size
        self._size_step = facts.size_step or facts.patch_size
        self.patch_layout = facts.patch_layout
        self.preprocessing: Preprocessing = facts.preprocessing
        self._recipe = None if recipe is None else dict(recipe)
        self._blocks = facts.blocks
        self.copy_maps = False
        deepest = max(self.layers)
        blocks.check_depth(deepest)
        cut_submodules(model, [blocks.in_last_stage(path, deepest) for path in facts.tail])
        blocks.cut(deepest, tuples=facts.returns_pairs)
        self.cut_tail(model)
        self._patch_embedding, channels = find_patch_embedding(model, blocks, facts.patch_size)
        self.in_channels = facts.in_channels or channels or 3
        self._batch_first_seen = False
        self._taps = BlockTaps(blocks.modules, self.layers, borders=blocks.borders)
        stored = model.state_dict().keys()
        self._lost_buffers = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in stored]
        self.register_load_state_dict_post_hook(_fill_lost_buffers)

    @classmethod
    @abc.abstractmethod
    def from_name(
        cls,
        name: str,
        *,
        layers: LayerChoice,
        pretrained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Backbone:
        """Build a backbone by its name in the library; each family says how it takes name, size and options.

        Args:
            name: as the library writes it.
            layers: as in `layerfuse.resolve_layers`, in the order wanted.
            pretrained: load the library's weights; else random ones.
            image_size: edge or (height, width) in pixels, if not the model's own.
            options: for the library's own constructor.

        Raises:
            ValueError: if the name, a layer, the image size or an option is not possible.
            ImportError: if the library is not installed.
        """

    @classmethod
    @abc.abstractmethod
    def rebuild(cls, recipe: Mapping[str, Any], *, layers: Sequence[int]) -> Backbone:
        """Build the architecture of a recipe with random weights: the same state dict keys and shapes.

        ``recipe`` is what `__init__` was given, as JSON keeps it; `from_config` adds the preprocessing. Nothing may be
        downloaded, and no code may run that the recipe chooses: a config may come from anywhere.
        """

    @classmethod
    def find_model(cls, held: object) -> nn.Module:
        """Return the vision model (``model`` of `__init__`) in a model, or in whatever else the family takes.

        Raises:
            TypeError: if there is no model in it.
        """
        if not isinstance(held, nn.Module):
            raise InvalidTypeError(
                f"the backbone family {cls.family!r} takes a model (nn.Module) or its name, got a "
                f"{type(held).__name__}."
            )
        return held

    @classmethod
    def list_names(cls) -> list[str]:
        """Return the names that `from_name` takes, as far as the family can tell without asking a network."""
        return []

    def cut_tail(self, model: nn.Module) -> None:
        """Remove, in place, the pooling and heads behind the blocks that are more than a path in ``facts.tail``."""
        return

    def run(self, images: torch.Tensor) -> None:
        """Call the model once on (B, in_channels, height, width) images of its dtype; hooks store the hidden states."""
        self.model(images)

    def run_patches(self, batch: PatchBatch) -> None:
        """Call the model once on patches (B, N, values); only of a family whose facts name a ``patch_layout``."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Backbone:
        """Build the architecture of another backbone's ``config``, with random weights; nothing is downloaded.

        Raises:
            ValueError: if a key is unknown or missing, or the config is of another family.
        """
        keys = {"family", "layers", "preprocessing", "recipe"}
        if set(config) != keys:
            raise InputError(
                f"a backbone config has the keys {', '.join(sorted(keys))}; missing: "
                f"{', '.join(sorted(keys - set(config))) or 'none'}, unknown: "
                f"{', '.join(sorted(set(config) - keys)) or 'none'}."
            )
        if config["family"] != cls.family:
            raise InputError(
                f"this config is of the backbone family {config['family']!r}, not {cls.family!r}; "
                "use layerfuse.backbones.backbone_from_config, which chooses the family."
            )
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        backbone = cls.rebuild(config["recipe"], layers=tuple(config["layers"]))
        backbone.preprocessing = preprocessing
        return backbone

    @property
    def members(self) -> tuple[Backbone, ...]:
        """The backbone itself: the only one."""
        return (self,)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks that are left, in order: as many as the deepest tapped layer's number, at least one."""
        return tuple(Blocks(self.model, self._blocks).modules)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able description from which `from_config` builds the same architecture.

        Raises:
            ValueError: if the model was made by code that layerfuse cannot call again, or has options that are no JSON.
        """
        if self._recipe is None:
            raise InputError(
                f"this {self.family!r} backbone was made from a {type(self.model).__name__} that layerfuse cannot "
                f"build again, so it has no config; make it with {type(self).__name__}.from_name(...) if it is to be "
                "saved."
            )
        config = {
            "family": self.family,
            "layers": list(self.layers),
            "preprocessing": self.preprocessing.to_dict(),
            "recipe": self._recipe,
        }
        try:
            plain: dict[str, Any] = json.loads(json.dumps(config))
        except TypeError as error:
            raise InputError(
                f"the options of this {self.family!r} backbone cannot be written as JSON ({error}); use options made "
                "of numbers, texts, lists and dictionaries if the backbone is to be saved."
            ) from error
        return plain

    @overload
    def forward(self, images: torch.Tensor) -> FeatureMaps: ...

    @overload
    def forward(self, images: PatchBatch | Mapping[str, Any]) -> list[FeatureMaps]: ...

    def forward(self, images: torch.Tensor | PatchBatch | Mapping[str, Any]) -> FeatureMaps | list[FeatureMaps]:
        """Encode images as the feature maps of the tapped layers.

        Args:
            images: (B, in_channels, height, width), prepared as ``preprocessing`` does it. Or pictures as patches, each
                on a grid of its own, for a model that takes them (NaFlex): what `prepare_patches`, SigLIP 2's processor
                or timm's NaFlex loader makes, see `layerfuse.preprocessing.PatchBatch`.

        Returns:
            L maps, each (B, N, C), with prefix tokens (B, P, C) split off, in the order asked. Of patches a list of
            these, one for each picture in order, with maps (1, N_i, C) on its own grid.

        Raises:
            ValueError: if the images have a shape or size that the backbone cannot take; TypeError if they are no
                tensor.
            TapError: (a ValueError) if what the layers put out cannot be told for certain.
        """
        if holds_patches(images):
            return self._each_picture(images)
        check_images(images, self.in_channels, takes_patches=self.patch_layout is not None)
        assert isinstance(images, torch.Tensor)
        grids = self.grids(images.shape[2:])
        hidden = self._hidden_states(images.to(self.dtype), grids)
        return as_features(hidden, self.layers, grids=grids, num_prefix_tokens=self.num_prefix_tokens)

    def _each_picture(self, images: Any) -> list[FeatureMaps]:
        values = (self.in_channels, *self.patch_size)
        batch = as_patches(images, values=values, model=self.model, takes_patches=self.patch_layout is not None)
        hidden = self._taps.run(self.run_patches, batch.to(self.dtype), copy_maps=self.copy_maps)
        tokens: dict[str, Any] = {"num_prefix_tokens": self.num_prefix_tokens, "grid": (1, batch.patches.shape[1])}
        for layer, states, stage in zip(self.layers, hidden, self._stages, strict=True):
            check_tokens(layer, states, stage, num_images=len(batch), **tokens)
        return each_picture(hidden, batch, self.layers, self.num_prefix_tokens)

    def _hidden_states(self, images: torch.Tensor, grids: Sequence[Grid]) -> Sequence[torch.Tensor]:
        num_images, prefix = images.shape[0], self.num_prefix_tokens
        shapes = [stage.shape(num_images, prefix, grid) for stage, grid in zip(self._stages, grids, strict=True)]
        undecided = not (torch.compiler.is_compiling() or self._batch_first_seen)
        # With as many images as tokens, blocks over (N, B, C) would put out the shape of blocks over (B, N, C). Until
        # a batch of another size has told which they are, such a batch is run in two parts.
        ambiguous = undecided and any(len(shape) == 3 and shape[1] == num_images for shape in shapes)
        if ambiguous and num_images > 1:
            parts = [self._hidden_states(part, grids) for part in images.tensor_split(2)]
            return [torch.cat(states) for states in zip(*parts, strict=True)]
        hidden = self._taps.run(self.run, images, copy_maps=self.copy_maps)
        tokens = []
        for layer, states, stage, grid in zip(self.layers, hidden, self._stages, grids, strict=True):
            check_tokens(layer, states, stage, num_images=num_images, num_prefix_tokens=prefix, grid=grid)
            tokens.append(stage.tokens(states, grid))
        if undecided:
            self._batch_first_seen = not ambiguous
        return tokens

    def grid(self, height: int, width: int) -> Grid:
        """Return the grid (H, W), in patches, of an image size in pixels; that of the first stage, see `grids`.

        Raises:
            ValueError: if the backbone cannot take that size.
        """
        how: dict[str, Any] = {"native": self.image_size, "any_size": self.any_size, "step": self._size_step}
        return grid_of((height, width), self.patch_size, **how)

    def grids(self, size: int | Sequence[int] | None = None) -> tuple[Grid, ...]:
        """Return the grids of all maps, as a fuser wants them: L pairs (H, W), in patches.

        ``size`` is that of the images, in pixels: one edge, or (height, width); the native size if None. A ValueError
        says why the backbone cannot take it.
        """
        patches = self.grid(*(self.image_size if size is None else as_pair(size)))
        return tuple(stage.grid(patches, self.patch_size) for stage in self._stages)

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Width C_l of each map."""
        return tuple(stage.embed_dim for stage in self._stages)

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) of a cell of each map, in pixels."""
        return tuple(stage.stride for stage in self._stages)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight that the images meet, to which they are cast; other parameters may have another."""
        try:
            weight = getattr(self.model.get_submodule(self._patch_embedding), "weight", None)
        except AttributeError:  # the model was wrapped since
            weight = None
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            return weight.dtype
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def layer_digests(self) -> dict[int, str]:
        """Return, for each tapped layer, a digest (SHA-256) of the architecture and of the weights that make its map.

        Weights count with their values and dtype as they are now. A backbone that is cut at another depth has the same
        digest for the same layer; preprocessing has no part in it.

        Raises:
            ValueError: as `config`.
        """
        described = {key: self.config[key] for key in ("family", "recipe")}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        found = []
        for weights in Blocks(self.model, self._blocks).weights(self.model):
            for name, weight in sorted(weights.items()):
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            found.append(digest.hexdigest())
        return {layer: found[layer] for layer in self.layers}

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them.

        Raises:
            ValueError: if the model has no such switch.
        """
        switch = getattr(self.model, "set_grad_checkpointing", None)
        if switch is None:
            raise InputError(
                f"{type(self.model).__name__} has no set_grad_checkpointing method; wrap its blocks with "
                "torch.utils.checkpoint in the model's own code."
            )
        switch(enable)

    def extra_repr(self) -> str:
        """Return the facts, for ``print(backbone)``."""
        return (
            f"family={self.family!r}, layers={self.layers}, num_blocks={self.num_blocks}, embed_dim={self.embed_dim}, "
            f"patch_size={self.patch_size}, image_size={self.image_size}"
        )


def _fill_lost_buffers(backbone: Any, keys: object) -> None:
    """Compute buffers that no file holds (position ids, rotary tables) once weights came into a model built on meta."""
    lost = [name for name in backbone._lost_buffers if not backbone.model.get_buffer(name).is_meta]
    if lost:
        with torch.device("cpu"):
            built = backbone.from_config(backbone.config).model
        for name in lost:
            backbone.model.get_buffer(name).copy_(built.get_buffer(name))
        backbone._lost_buffers = []


BACKBONES: Registry[Backbone] = Registry("backbone family", group="layerfuse.backbones")
