"""Backbones from transformers: CLIP, SigLIP, DINOv2, DINOv3, AIMv2, ViT, DeiT, BEiT, InternViT, Swin, Hiera, SAM, …."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from layerfuse._hub import FETCH_ERRORS, why_not_fetched
from layerfuse.backbones._transformers_facts import (
    known_types,
    read_preprocessing,
    takes,
    transformers_facts,
    vision_part,
)
from layerfuse.backbones._transformers_stages import reset_windows
from layerfuse.backbones.base import BACKBONES, Backbone, as_pair, checked_multiple
from layerfuse.errors import InputError, MissingPackageError
from layerfuse.layers import LayerChoice
from layerfuse.preprocessing import PatchBatch, Preprocessing
from layerfuse.registry import unknown_name_message

__all__ = ["TransformersBackbone"]

logger = logging.getLogger(__name__)

# Arguments of from_pretrained that say where and how to load; the other options are fields of the model's config.
_LOADING = ("attn_implementation", "cache_dir", "dtype", "local_files_only", "revision", "subfolder", "token")
# Of these, the ones that a config, too, is found with.
_FINDING = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
# What a config notes besides the architecture: whose file it was read from, labels of a classifier that is not there.
_NO_ARCHITECTURE = (
    *("_name_or_path", "transformers_version", "architectures"),
    *("id2label", "label2id", "torch_dtype", "dtype"),
)
# What a config computes from its number of blocks, for transformers' own backbones: it computes it anew.
_DERIVED = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")


@BACKBONES.register("transformers")
class TransformersBackbone(Backbone):
    """A vision model of transformers. Other arguments and errors are `Backbone`'s.

    Args:
        model: such as CLIPVisionModel or Dinov2Model; of a CLIPModel, a SiglipModel or an image
            classifier the vision model inside is taken.
        image_size: as in `Backbone.from_name`, counts as native from then on; the model resizes its position
            embeddings in every call.
        preprocessing: the released models' one if None.

    Raises:
        ValueError: if the model type is not known, or the size is not possible.
    """

    family = "transformers"
    library = "transformers"

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerChoice,
        image_size: int | tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        model = vision_part(model)
        facts = transformers_facts(model)
        self._own_size = facts.image_size
        self._position_flag = takes(model, "interpolate_pos_encoding")  # is asked to resize position embeddings
        self._patches = takes(model, "spatial_shapes")  # takes patches with their grid (SigLIP2 NaFlex), not images
        if image_size is not None and as_pair(image_size) != facts.image_size:
            if not facts.any_size and not self._position_flag:
                raise InputError(
                    f"{type(model).__name__} takes only {facts.image_size[0]}x{facts.image_size[1]} pixels, so "
                    f"image_size={image_size} is not possible; leave image_size out."
                )
            facts = replace(facts, image_size=checked_multiple(as_pair(image_size), facts))
        facts = replace(facts, preprocessing=replace(preprocessing or facts.preprocessing, size=facts.image_size))
        # AutoModel chooses the class by the config, so the config is all that is needed to build the model again.
        config: Any = model.config
        fields = {key: value for key, value in config.to_dict().items() if key not in _NO_ARCHITECTURE}
        recipe = {"config": fields, "image_size": list(facts.image_size)}
        super().__init__(model, layers=layers, facts=facts, recipe=recipe)
        if config.model_type == "swin":
            reset_windows(model, facts.image_size)

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        layers: LayerChoice,
        pretrained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> TransformersBackbone:
        """Build a vision model as `Backbone.from_name` says; a checkpoint that lacks weights of it is an error.

        ``name`` is one on the hub, or a local folder; of a checkpoint with text and vision (CLIP, SigLIP) the vision
        part is loaded. Without weights also a model type, such as ``"clip_vision_model"``. ``options`` are fields of
        the model's config (``{"num_hidden_layers": 2}``), and ``attn_implementation``, ``dtype``, ``revision``,
        ``subfolder``, ``cache_dir``, ``local_files_only``, ``token``.
        """
        transformers = _import_transformers()
        given = dict(options or {})
        where = {key: given[key] for key in _FINDING if key in given}
        config = _read_config(transformers, name, given, where, pretrained=pretrained)
        how: dict[str, Any] = {key: given[key] for key in ("attn_implementation", "dtype") if key in given}
        missing: set[str] = set()
        if pretrained:
            model, missing = _load(transformers, name, config, {**how, **where})
        else:
            model = transformers.AutoModel.from_config(config, **how)
        described: dict[str, Any] = {}
        if pretrained or name not in transformers.CONFIG_MAPPING:
            with suppress(*FETCH_ERRORS):
                described, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name, **where)
            if not described:
                logger.warning(
                    "%s has no preprocessor config; using that of released %s models.", name, config.model_type
                )
        facts = transformers_facts(model)
        preprocessing = read_preprocessing(described, kind=config.model_type, size=facts.image_size)
        backbone = cls(model, layers=layers, image_size=image_size, preprocessing=preprocessing)
        _check_complete(name, backbone.model, missing, blocks=facts.blocks)
        return backbone

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any], *, layers: Sequence[int]) -> TransformersBackbone:
        """Build a recipe as `Backbone.rebuild` says."""
        transformers = _import_transformers()
        fields = dict(recipe["config"])
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        attention = recipe.get("attn_implementation")
        how = {} if attention is None else {"attn_implementation": attention}
        try:
            model = transformers.AutoModel.from_config(config, **how)
        except (ImportError, ValueError) as error:
            if attention is None:
                raise
            raise InputError(
                f"this backbone was saved with the attention implementation {attention!r}, which is not to be had "
                f"here; install what it needs, or write 'sdpa' for it in config.json. transformers says: {error}"
            ) from error
        return cls(model, layers=layers, image_size=tuple(recipe["image_size"]))

    @classmethod
    def find_model(cls, held: object) -> nn.Module:
        """Find the vision model, also of a larger one; of a config, build it with random weights."""
        transformers = _import_transformers()
        if isinstance(held, transformers.PreTrainedConfig):
            return transformers.AutoModel.from_config(getattr(held, "vision_config", held))
        return vision_part(super().find_model(held))

    @classmethod
    def list_names(cls) -> list[str]:
        """Return the known model types, such as ``"clip_vision_model"``; the hub's models of these types fit."""
        return known_types()

    @property
    def config(self) -> dict[str, Any]:
        """The config of `Backbone`, with the attention that the model computes with now."""
        model: Any = self.model
        config = super().config
        config["recipe"]["attn_implementation"] = model.config._attn_implementation
        return config

    def cut_tail(self, model: nn.Module) -> None:
        """Remove final norm, pooling head and the mask token of masked pretraining from the model."""
        cut: Any = model
        for name in ("post_layernorm", "layernorm", "norm", "rms_norm", "neck"):
            if isinstance(getattr(cut, name, None), nn.Module):
                setattr(cut, name, nn.Identity())
        if isinstance(getattr(cut, "pooler", None), nn.Module):
            cut.pooler = None
        if isinstance(getattr(cut, "head", None), nn.Module):
            cut.head = None
            cut.use_head = False
        # What merges patches stands at the end of Swin's stages.
        stages: Any = getattr(getattr(cut, "encoder", None), "layers", ())
        if len(stages) and hasattr(stages[-1], "downsample"):
            stages[-1].downsample = None
        # Used only with bool_masked_pos; without it the parameter would never get a gradient.
        embeddings: Any = getattr(cut, "embeddings", None)
        if getattr(embeddings, "mask_token", None) is not None:
            embeddings.mask_token = None

    def run(self, images: torch.Tensor) -> None:
        """Call the model, with the size or the patches of the images where it wants to be told."""
        if self._patches:
            from einops import rearrange

            rows, columns = self.grid(images.shape[2], images.shape[3])
            height, width = self.patch_size
            # Channels last inside a patch, as SigLIP2's image processor has them.
            patches = rearrange(images, "b c (row h) (column w) -> b (row column) (h w c)", h=height, w=width)
            # Filled where the images are: torch.tensor([[rows, columns], …]) would copy from the host in each call.
            edges = [torch.full((images.shape[0],), edge, device=images.device) for edge in (rows, columns)]
            shapes = torch.stack(edges, dim=1)
            mask = torch.ones(patches.shape[:2], dtype=torch.long, device=images.device)
            self.model(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
        elif self._position_flag and tuple(images.shape[2:]) != self._own_size:
            self.model(images, interpolate_pos_encoding=True)
        else:
            self.model(images)

    def run_patches(self, batch: PatchBatch) -> None:
        """Call the model with patches, the grids of their pictures, and the mask of the padding."""
        self.model(batch.patches, pixel_attention_mask=batch.mask.long(), spatial_shapes=batch.spatial_shapes)

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them; works in training mode only.

        Raises:
            ValueError: if the model has no such switch.
        """
        model: Any = self.model
        if not model.supports_gradient_checkpointing:
            raise InputError(
                f"transformers has no gradient checkpointing for {type(model).__name__}; leave it off, or take the "
                "model from another library."
            )
        # Renamed in 5.23; 5.17 has the older names only.
        prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        if enable:
            # Reentrant checkpoints run the blocks without gradient, so what the taps store would have none.
            getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(model, f"{prefix}_checkpointing_disable")()


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            "the backbone family 'transformers' needs the package transformers; install it with "
            "`pip install layerfuse[transformers]`."
        ) from error
    module: ModuleType = transformers
    return module


def _read_config(
    transformers: ModuleType, name: str, options: Mapping[str, Any], where: Mapping[str, Any], *, pretrained: bool
) -> Any:
    if not pretrained and name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(name, **where)
        except (*FETCH_ERRORS, ValueError) as error:
            types = "" if pretrained else " or a model type, such as 'clip_vision_model'"
            raise InputError(
                f"transformers finds no model {name!r}; give a hub name, a local folder with config.json{types}. "
                f"It says: {why_not_fetched(error)}."
            ) from error
    config = getattr(config, "vision_config", config)
    fields = {key: value for key, value in options.items() if key not in _LOADING}
    known = config.to_dict()
    for key in fields:
        if key not in known:
            raise InputError(unknown_name_message(f"option of {type(config).__name__}", key, {*known, *_LOADING}))
    for key in ("model_type", *_DERIVED):
        known.pop(key, None)
    return type(config)(**{**known, **fields}) if fields else config


def _load(transformers: ModuleType, name: str, config: Any, arguments: Mapping[str, Any]) -> tuple[nn.Module, set[str]]:
    from safetensors import SafetensorError

    # AutoModel chooses by the config, so with the vision config of a CLIP checkpoint only its vision part is built.
    try:
        model, report = transformers.AutoModel.from_pretrained(
            name, config=config, output_loading_info=True, **arguments
        )
    except (EOFError, SafetensorError, pickle.UnpicklingError) as error:  # torch advises to read such a file as code
        raise InputError(
            f"the weights of {name!r} are no whole file of tensors ({type(error).__name__}); download them again, as "
            "safetensors, or pass pretrained=False."
        ) from error
    except FETCH_ERRORS as error:
        raise InputError(
            f"transformers finds no weights for {name!r}; give a name on the hub or a folder with weights in "
            f"safetensors, or pass pretrained=False (--pretrained false). It says: {why_not_fetched(error)}."
        ) from error
    except RuntimeError as error:  # weights of other shapes
        raise InputError(
            f"the weights of {name!r} do not fit the model that its config and the options describe. Leave out options "
            f"that change shapes, or pass pretrained=False. transformers says: {error}"
        ) from error
    return model, set(report["missing_keys"])


def _check_complete(name: str, model: nn.Module, missing: set[str], *, blocks: str) -> None:
    # Asked of the model that is left: nobody needs weights of a pooler or a norm that was cut off. Blocks are needed,
    # since layers are counted by them.
    left = model.state_dict().keys()
    random = sorted(key for key in missing if key in left or key.startswith(f"{blocks}."))
    if random:
        raise InputError(
            f"{name!r} lacks weights of {type(model).__name__}, which would be left random: {', '.join(random)}. "
            "Check that it is a checkpoint of this model, or pass pretrained=False."
        )
