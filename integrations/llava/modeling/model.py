"""LLaVA on transformers with a layerfuse backbone and fuser inside.

    pixel_values ── vision_tower (backbone, taps) ── fuser ── multi_modal_projector ──► spliced into the text ── LLM
                                      └── injection (a merger per tap) ──► added around decoder layers ─────────┘

Everything transformers offers for LLaVA (`generate`, `pipeline`, PEFT, quantisation, FSDP2) holds for these classes:
they subclass transformers' own and replace only how image features come about.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from integrations.llava.image_layout import AnyResLayout, ImageSize
from layerfuse.backbones import AnyBackbone, backbone_from_config
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import Fuser, fuser_from_config

from .condition import blank_condition, read_condition
from .configuration import FusedLlavaConfig, LayerfuseVisionConfig
from .generation import GeneratesFromImages, forbid_token
from .image_maps import image_maps
from .injection import (
    InjectedFeatures,
    LayerInjection,
    current_call,
    fitting_injection,
    injecting,
    injection_settings,
    leading_maps,
    prepare_layers,
)
from .language_head import build_head, chunked_text_loss, text_loss
from .parts import (
    Projector,
    block_classes,
    build_part,
    draw,
    forbid_uncapped_attention,
    keep_as_built,
    learns,
    restore_buffers,
    set_attention,
)
from .quantization import keep_unpackable
from .tiling import image_tiles

__all__ = [
    "FusedLlavaConfig",
    "FusedLlavaForConditionalGeneration",
    "FusedLlavaModel",
    "LayerfuseVisionConfig",
    "LayerfuseVisionModel",
    "Projector",
    "ReadyParts",
]


class _LoadsWhole(PreTrainedModel):
    """Loading that is complete or fails: weights cover the model, and buffers no checkpoint holds are right."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but weights that do not cover the model are an error, not a warning.

        Raises:
            ValueError: listing every missing, unexpected and misshapen key; with `ignore_mismatched_sizes=True` the
                misshapen are drawn anew.
        """
        kinds = ["missing", "unexpected"] + ([] if kwargs.pop("ignore_mismatched_sizes", False) else ["mismatched"])
        # Else transformers would only say that something did not fit.
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        model, info = loaded
        faults = {kind: sorted(map(str, info.get(f"{kind}_keys") or ())) for kind in kinds}
        if any(faults.values()):
            listing = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys)
            raise InputError(
                f"the weights in {args[0] if args else 'the checkpoint'} do not fit the model its config describes: "
                f"{listing}. Check that config and weights come from the same run."
            )
        if misshapen := info.get("mismatched_keys"):
            draw(model, {key if isinstance(key, str) else key[0] for key in misshapen})
        restore_buffers(model)
        keep_unpackable(model)
        if isinstance(model, GeneratesFromImages):
            # Its generation config, which 0.1 wrote without it, has been read after the model was built.
            forbid_token(model.generation_config, model.config.image_token_index)
        return (model, info) if output_loading_info else model

    def init_weights(self) -> None:
        """As in transformers, and buffers that no checkpoint holds get their values, also after `to_empty`."""
        super().init_weights()
        restore_buffers(self)


class LayerfuseVisionModel(_LoadsWhole):
    """A layerfuse backbone, built from its config unless it is given, where transformers expects a vision tower."""

    config: LayerfuseVisionConfig
    config_class = LayerfuseVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_tower"
    # A backbone's library chooses its attention; a choice for the whole model is the language model's alone.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: LayerfuseVisionConfig, backbone: AnyBackbone | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            if config.backbone is None:
                raise InputError("LayerfuseVisionConfig describes no backbone; set backbone=Backbone.config.")
            described = config.backbone
            backbone = build_part(lambda: backbone_from_config(described))
            set_attention(backbone, config._attn_implementation)
        else:
            # Weights that are handed over compute as they did.
            own = next((part.config for part in backbone.modules() if isinstance(part, PreTrainedModel)), config)
            config._attn_implementation_internal = own._attn_implementation
            keep_as_built(backbone)
        self.backbone = backbone
        # Device maps must not cut within a block.
        self._no_split_modules = sorted({kind for member in backbone.members for kind in block_classes(member)})
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> FeatureMaps:
        """Encode (B, channels, height, width) images into L feature maps."""
        maps: FeatureMaps = self.backbone(pixel_values)
        return maps

    def train(self, mode: bool = True) -> LayerfuseVisionModel:
        """Switch modes; a frozen backbone stays in evaluation mode, so that no dropout disturbs it."""
        super().train(mode and learns(self))
        return self


@dataclass
class ReadyParts:
    """Ready modules, so that building a model from them allocates nothing twice."""

    backbone: AnyBackbone
    fuser: Fuser
    language_model: PreTrainedModel


class FusedLlavaModel(_LoadsWhole, LlavaModel):
    """Backbone, fuser, projector and language model without its head; ready parts, or built from the config."""

    config: FusedLlavaConfig
    config_class = FusedLlavaConfig
    image_newline: nn.Parameter | None
    # A whole model's folder holds the head, too.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012  (transformers copies it)

    def __init__(self, config: FusedLlavaConfig, parts: ReadyParts | None = None) -> None:
        # LlavaModel's own constructor would build a projector for a tower without fuser.
        PreTrainedModel.__init__(self, config)
        if not isinstance(config.vision_config, LayerfuseVisionConfig) or config.fuser is None:
            raise InputError(
                "FusedLlavaConfig describes no backbone or no fuser; set vision_config=LayerfuseVisionConfig(...) and "
                "fuser=Fuser.config, or let build_model make the model from ready parts."
            )
        assert isinstance(config.text_config, PreTrainedConfig)
        self.vision_tower = LayerfuseVisionModel(config.vision_config, parts.backbone if parts else None)
        described = config.fuser
        self.fuser = parts.fuser if parts else build_part(lambda: fuser_from_config(described))
        forbid_uncapped_attention(config.text_config)
        projector = Projector(self.fuser.out_channels, config.text_config.hidden_size)
        self.multi_modal_projector = projector  # type: ignore[assignment]
        self.injection = self._build_injection(config, parts is not None)
        # As in LLaVA-NeXT, name included: what stands at the end of a row of tokens.
        tiled, hidden = isinstance(config.layout, AnyResLayout), config.text_config.hidden_size
        self.register_parameter("image_newline", nn.Parameter(torch.empty(hidden)) if tiled else None)
        self._init_weights(self)
        self.language_model = parts.language_model if parts else AutoModel.from_config(config.text_config)
        keep_as_built(self.multi_modal_projector)
        if self.injection is not None:
            prepare_layers(self.language_model)
        if parts:
            keep_as_built(self.fuser)
            keep_as_built(self.language_model)
        inside = () if self.injection is None else self.injection.modules()
        fusers = {type(module).__name__ for module in (self.fuser, *inside) if isinstance(module, Fuser)}
        self._no_split_modules = sorted(fusers)
        self.post_init()

    def _build_injection(self, config: FusedLlavaConfig, of_parts: bool) -> LayerInjection | None:
        described = injection_settings(config.injection)
        if described is None:
            return None
        backbone, text = self.vision_tower.backbone, config.get_text_config()
        settings = fitting_injection(described, backbone, self.fuser, text.num_hidden_layers)
        hidden = config.text_config.hidden_size  # type: ignore[union-attr]
        if not of_parts:
            return build_part(lambda: LayerInjection(settings, backbone, hidden))
        injection = LayerInjection(settings, backbone, hidden)
        keep_as_built(injection)
        return injection

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in transformers, which knows no newline; LLaVA-NeXT draws it like an embedding."""
        super()._init_weights(module)
        if module is self and self.image_newline is not None:
            std = 1 / math.sqrt(self.image_newline.numel())
            initialization.normal_(self.image_newline, mean=0.0, std=std)

    @property
    def fuser_grids(self) -> tuple[Grid, ...]:
        """Grids of the maps that the fuser reads, of an image of the backbone's own size."""
        return self.vision_tower.backbone.grids()[: self.fuser.num_layers]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | Sequence[ImageSize] | None = None,
        condition: torch.Tensor | None = None,
        feature_maps: FeatureMaps | None = None,
        uncached: Sequence[bool] | None = None,
        **_: Any,  # transformers passes what its own towers take
    ) -> BaseModelOutputWithPooling:
        """Encode, fuse and project images.

        Args:
            pixel_values: (B, channels, height, width), 3 channels, or as many for each of several backbones; where
                images are cut into tiles, as `image_tiles` takes them. Prepared; or uint8, which the backbone's
                preprocessing normalises here, on their device.
            vision_feature_layer: unused; the backbone taps what its config says.
            vision_feature_select_strategy: unused, likewise.
            image_sizes: (B, 2), height and width before preparing, where images are cut into tiles; else unused.
            condition: what a fuser with a condition reads of each image's question: (B, D_c); or (B, Q) token ids,
                filled up with -100, whose mean embedding it is.
            feature_maps: of tiles that are encoded already, (tiles, N, C) each, in place of their pixels.
            uncached: for each tile of all images, True where its pixels are given, if there are pixels and maps.

        Returns:
            `last_hidden_state`: (B, N, C_out) fused tokens, or those of all tiles; `pooler_output`: B tensors (N, D),
            projected, tiles put together; with layer injection `deepstack_features`, as `InjectedFeatures` has them.
            With `return_dict=False` a tuple of these.

        Raises:
            ValueError: if the fuser needs a condition and there is none, or tiles and sizes do not go together.
        """
        if feature_maps is None:
            tiles = image_tiles(self.config.layout, pixel_values, image_sizes)
            features = image_maps(self.vision_tower, tiles.pixels)
        else:
            features = image_maps(self.vision_tower, pixel_values, feature_maps, uncached)
            tiles = image_tiles(self.config.layout, features[0], image_sizes)
        maps = leading_maps(features, self.fuser.num_layers)
        asked = read_condition(self.fuser, condition, self.get_input_embeddings())
        fused = self.fuser(maps) if asked is None else self.fuser(maps, tiles.repeat(asked.to(maps[0].device)))
        projected: Any = tiles.pack(self.multi_modal_projector(fused), self.image_newline)
        if self.injection is None:
            return BaseModelOutputWithPooling(last_hidden_state=fused, pooler_output=projected)
        # Where a newline stands, nothing is added, so that new mergers leave everything as it is.
        nothing = None if self.image_newline is None else torch.zeros_like(self.image_newline)
        injected = [tiles.pack(tokens, nothing) for tokens in self.injection(features)]
        if (call := current_call()) is not None:
            call.features = injected
        return InjectedFeatures(last_hidden_state=fused, pooler_output=projected, deepstack_features=injected)

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As LlavaModel; in a forward pass with layer injection, note where the images are."""
        mask: torch.Tensor = super().get_placeholder_mask(*args, **kwargs)
        if (call := current_call()) is not None:
            call.mask = mask[..., 0]
        return mask

    @functools.wraps(LlavaModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As LlavaModel, but in training a batch without images touches every trainable parameter, with weight zero.

        Otherwise distributed engines wait forever for gradients of fuser and projector. The published code does the
        same by giving each text-only sample a black image.
        """
        # Arguments have other names in other versions of transformers, so its own signature is read.
        kwargs.update(zip(_ARGUMENTS, args, strict=False))
        condition, feature_maps = kwargs.pop("condition", None), kwargs.get("feature_maps")
        text_only = kwargs.get("input_ids") is not None and kwargs.get("pixel_values") is None and feature_maps is None
        if text_only and self.training and torch.is_grad_enabled():
            inputs_embeds = self.get_input_embeddings()(kwargs.pop("input_ids"))
            backbone = self.vision_tower.backbone
            size, channels = backbone.image_size, backbone.in_channels
            black = inputs_embeds.new_zeros(self.config.layout.num_tiles(size), channels, *size)
            blank = blank_condition(self.fuser, 1, inputs_embeds)
            features: Any = self.get_image_features(black, image_sizes=[size], condition=blank)
            unused = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
            kwargs["inputs_embeds"] = inputs_embeds + 0 * sum(tokens[0].sum() for tokens in unused)
        with nullcontext() if self.injection is None else injecting(self.injection.settings, kwargs):
            encoded = (kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
            pixels = kwargs.get("pixel_values") is not None and (condition is not None or encoded is not None)
            if pixels or feature_maps is not None:
                encoded = self._encoded(kwargs, condition, encoded)
            if encoded is not None:
                kwargs["inputs_embeds"] = self._spliced(kwargs, encoded)
            return super().forward(**kwargs)

    def _encoded(self, arguments: dict[str, Any], condition: torch.Tensor | None, encoded: Any) -> Any:
        """Take images out of the arguments of `forward`, and encode them.

        LlavaModel hands what it does not know on to the language model, which knows no condition and no maps either.
        """
        if encoded is not None:
            raise InputError("pixel_values and mm_encoder_outputs are given, which are the images twice; give one.")
        images = {name: arguments.pop(name, None) for name in _IMAGES}
        return self.get_image_features(**images, condition=condition)

    def _spliced(self, arguments: dict[str, Any], encoded: Any) -> torch.Tensor:
        """Take ids out of the arguments of `forward`, and put encoded images among the embedded ids."""
        ids, embeds = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
        if embeds is None:
            embeds = self.get_input_embeddings()(ids)
        features = torch.cat(list(encoded.pooler_output)).to(embeds.device, embeds.dtype)
        places = self.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=features)
        spliced: torch.Tensor = embeds.masked_scatter(places, features)
        return spliced


_ARGUMENTS = tuple(inspect.signature(LlavaModel.forward).parameters)[1:]
_IMAGES = ("pixel_values", "image_sizes", "feature_maps", "uncached")


class FusedLlavaForConditionalGeneration(_LoadsWhole, GeneratesFromImages, LlavaForConditionalGeneration):
    """The whole model: images and text in, text out; of ready parts, or built from the config."""

    config: FusedLlavaConfig
    config_class = FusedLlavaConfig

    def __init__(self, config: FusedLlavaConfig, parts: ReadyParts | None = None) -> None:
        PreTrainedModel.__init__(self, config)
        text = config.text_config
        assert isinstance(text, PreTrainedConfig)
        self.model = FusedLlavaModel(config, parts)
        bias = bool((config.head or {}).get("bias"))
        self.set_output_embeddings(nn.Linear(text.hidden_size, text.vocab_size, bias=bias))
        embedding = self.get_input_embeddings().weight
        name = next(name for name, parameter in self.named_parameters() if parameter is embedding)
        self._tied_weights_keys = {"lm_head.weight": name}
        forbid_token(self.generation_config, config.image_token_index)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Put another linear layer in the head's place; scale and cap of the language model's logits stay."""
        self.lm_head = build_head(new_embeddings, self.config.head)

    @functools.wraps(LlavaForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As LlavaForConditionalGeneration; with `cross_entropy="chunked"` the loss alone, as `chunked_text_loss`."""
        options = {"places": kwargs.pop("label_places", None)}
        if kwargs.pop("cross_entropy", "plain") == "plain":
            return super().forward(*args, **kwargs)
        options |= {name: kwargs.pop(name) for name in ("labels", "num_items_in_batch") if name in kwargs}
        hidden = self.model(*args, **kwargs)[0]
        loss = chunked_text_loss(self.lm_head, hidden, image_token_id=self.config.image_token_index, **options)
        return LlavaCausalLMOutputWithPast(loss=loss)  # type: ignore[arg-type]

    def loss_function(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        **options: Any,
    ) -> torch.Tensor:  # type: ignore[override]
        """Compute `text_loss`; transformers' models call it so, with all that `forward` was given."""
        options = {name: value for name, value in options.items() if name not in ("condition", *_IMAGES)}
        return text_loss(logits, labels, vocab_size, image_token_id=self.config.image_token_index, **options)


AutoModel.register(LayerfuseVisionConfig, LayerfuseVisionModel, exist_ok=True)
AutoModel.register(FusedLlavaConfig, FusedLlavaModel, exist_ok=True)
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForPreTraining):
    _auto.register(FusedLlavaConfig, FusedLlavaForConditionalGeneration, exist_ok=True)
