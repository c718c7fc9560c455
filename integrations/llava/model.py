"""LLaVA on transformers with a layerfuse backbone and fuser inside.

    pixel_values ── vision_tower (backbone, taps) ── fuser ── multi_modal_projector ──► spliced into the text ── LLM

Everything transformers offers for LLaVA (`generate`, `pipeline`, PEFT, quantisation, FSDP2) holds for these classes:
they subclass transformers' own and replace only how image features come about.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from layerfuse.backbones import Backbone, backbone_from_config
from layerfuse.encoder import check_fuser_fits
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps
from layerfuse.fusers import Fuser, fuser_from_config

from .generate_mixin import GeneratesFromImages

__all__ = [
    "FusedLlavaConfig",
    "FusedLlavaForConditionalGeneration",
    "FusedLlavaModel",
    "LayerfuseVisionConfig",
    "LayerfuseVisionModel",
    "Projector",
    "build_model",
    "learns",
    "num_image_tokens",
]


class LayerfuseVisionConfig(PreTrainedConfig):
    """A backbone's config, as transformers stores configs.

    Attributes:
        backbone: `Backbone.config`.
        hidden_size: width C of its maps.
        image_size: (height, width) in pixels.
    """

    model_type = "layerfuse_vision"
    backbone: dict[str, Any] | None = None
    hidden_size: int | None = None
    image_size: list[int] | None = None


class FusedLlavaConfig(LlavaConfig):
    """LLaVA's config with a fuser and the prompt template the model was trained with.

    Attributes:
        fuser: `Fuser.config`.
        prompt_template: `Template.to_dict()`; what the model expects to read.
    """

    model_type = "layerfuse_llava"
    fuser: dict[str, Any] | None = None
    prompt_template: dict[str, Any] | None = None


class _LoadsWhole(PreTrainedModel):
    """Loading that is complete or fails: weights cover the model, and buffers no checkpoint holds are right."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but weights that do not cover the model are an error, not a warning.

        Raises:
            ValueError: listing every missing, unexpected and misshapen key.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        faults = {
            kind: sorted(map(str, info.get(f"{kind}_keys") or ())) for kind in ("missing", "unexpected", "mismatched")
        }
        if any(faults.values()):
            listing = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys)
            raise InputError(
                f"the weights in {args[0] if args else 'the checkpoint'} do not fit the model its config describes: "
                f"{listing}. Check that config and weights come from the same run."
            )
        for module in model.modules():
            for name, value in getattr(module, "_kept_buffers", {}).items():
                module.get_buffer(name).copy_(value)
        return (model, info) if output_loading_info else model


class LayerfuseVisionModel(_LoadsWhole):
    """A layerfuse backbone where transformers expects a vision tower.

    Args:
        config: describes the backbone.
        backbone: a ready one; built from the config, with random weights, if None.
    """

    config: LayerfuseVisionConfig
    config_class = LayerfuseVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_tower"
    # A backbone's library chooses its attention; a choice for the whole model is the language model's alone.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: LayerfuseVisionConfig, backbone: Backbone | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            assert config.backbone is not None
            with _real_tensors() as dtype:
                backbone = backbone_from_config(config.backbone).to(dtype)
        self.backbone = backbone
        _keep_as_built(self.backbone)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> FeatureMaps:
        """Encode images.

        Args:
            pixel_values: (B, 3, height, width).

        Returns:
            L feature maps.
        """
        maps: FeatureMaps = self.backbone(pixel_values)
        return maps

    def train(self, mode: bool = True) -> LayerfuseVisionModel:
        """Switch modes; a frozen backbone stays in evaluation mode, so that no dropout disturbs it."""
        super().train(mode and learns(self))
        return self


class Projector(nn.Module):
    """LLaVA-1.5's `mlp2x_gelu`: linear, GELU, linear.

    Args:
        in_channels: width of the fused tokens.
        out_channels: width D of the language model.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project (B, N, C_out) fused tokens to (B, N, D)."""
        projected: torch.Tensor = self.linear_2(self.act(self.linear_1(tokens)))
        return projected


class _Head(nn.Linear):
    """Predicts text tokens only: the image token's logit is the lowest number there is.

    So the softmax is over the language model's own vocabulary, though the embedding has a row for the image token.
    """

    image_token_id: int = -1

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().forward(hidden)
        logits[..., self.image_token_id] = torch.finfo(logits.dtype).min
        return logits


@dataclass
class _Parts:
    """Ready modules, so that building a model from them allocates nothing twice."""

    backbone: Backbone
    fuser: Fuser
    language_model: PreTrainedModel


class FusedLlavaModel(_LoadsWhole, LlavaModel):
    """Backbone, fuser, projector and language model without its head.

    Args:
        config: describes all of them.
        parts: ready modules; built from the config if None.
    """

    config: FusedLlavaConfig
    config_class = FusedLlavaConfig

    def __init__(self, config: FusedLlavaConfig, parts: _Parts | None = None) -> None:
        # LlavaModel's own constructor would build a projector for a tower without fuser.
        PreTrainedModel.__init__(self, config)
        assert isinstance(config.vision_config, LayerfuseVisionConfig) and config.fuser is not None
        assert isinstance(config.text_config, PreTrainedConfig)
        self.vision_tower = LayerfuseVisionModel(config.vision_config, parts.backbone if parts else None)
        with _real_tensors() as dtype:
            self.fuser = parts.fuser if parts else fuser_from_config(config.fuser).to(dtype)
        projector = Projector(self.fuser.out_channels, config.text_config.hidden_size)
        self.multi_modal_projector = projector  # type: ignore[assignment]
        self.language_model = parts.language_model if parts else AutoModel.from_config(config.text_config)
        _keep_as_built(self.fuser)
        _keep_as_built(self.multi_modal_projector)
        if parts:
            _keep_as_built(self.language_model)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        return_dict: bool = True,
        **_: Any,  # transformers passes what its own towers take
    ) -> BaseModelOutputWithPooling:
        """Encode, fuse and project images.

        Args:
            pixel_values: (B, 3, height, width).
            vision_feature_layer: unused; the backbone taps what its config says.
            vision_feature_select_strategy: unused, likewise.
            image_sizes: unused; all images have one size.
            return_dict: unused.

        Returns:
            `last_hidden_state`: (B, N, C_out) fused tokens; `pooler_output`: B tensors (N, D), projected.
        """
        tower = self.vision_tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns(tower)):
            features = tower(pixel_values.to(next(tower.parameters()).dtype))
        fused = self.fuser(features)
        projected = self.multi_modal_projector(fused)
        return BaseModelOutputWithPooling(last_hidden_state=fused, pooler_output=list(projected))  # type: ignore[arg-type]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LlavaModel, but in training a batch without images touches every trainable parameter, with weight zero.

        Otherwise distributed engines wait forever for gradients of fuser and projector. The published code does the
        same by giving each text-only sample a black image.
        """
        if self.training and torch.is_grad_enabled() and pixel_values is None and input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            assert isinstance(self.config.vision_config, LayerfuseVisionConfig)
            black = inputs_embeds.new_zeros(1, 3, *(self.config.vision_config.image_size or ()))
            unused: Any = self.get_image_features(black).pooler_output
            inputs_embeds = inputs_embeds + 0 * unused[0].sum()
            input_ids = None
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs)


class FusedLlavaForConditionalGeneration(_LoadsWhole, GeneratesFromImages, LlavaForConditionalGeneration):
    """The whole model: images and text in, text out.

    Args:
        config: describes all parts.
        parts: ready modules; built from the config if None.
    """

    config: FusedLlavaConfig
    config_class = FusedLlavaConfig

    def __init__(self, config: FusedLlavaConfig, parts: _Parts | None = None) -> None:
        PreTrainedModel.__init__(self, config)
        text = config.text_config
        assert isinstance(text, PreTrainedConfig)
        self.model = FusedLlavaModel(config, parts)
        self.lm_head = _Head(text.hidden_size, text.vocab_size, bias=False)
        self.lm_head.image_token_id = config.image_token_index
        self.post_init()


def build_model(
    backbone: Backbone,
    fuser: Fuser,
    llm: PreTrainedModel,
    *,
    image_token_id: int,
    prompt_template: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> FusedLlavaForConditionalGeneration:
    """Assemble a model from ready parts; their modules are used, not copied.

    Args:
        backbone: taps as many layers as the fuser takes.
        fuser: its tokens are projected by a new, randomly initialised projector.
        llm: a causal language model of transformers; its embedding grows if it has no row for the image token.
        image_token_id: the tokenizer's id of `<image>`.
        prompt_template: stored with the checkpoint.
        dtype: of backbone, fuser and projector; None for the language model's.

    Returns:
        The model.

    Raises:
        ValueError: if the fuser does not fit the backbone.
    """
    check_fuser_fits(backbone, fuser)
    embedding: Any = llm.get_input_embeddings()
    if image_token_id >= embedding.num_embeddings:
        llm.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    attention = llm.config._attn_implementation
    vision = LayerfuseVisionConfig(
        backbone=backbone.config, hidden_size=backbone.embed_dim, image_size=list(backbone.image_size)
    )
    config = FusedLlavaConfig(
        vision_config=vision,
        text_config=llm.config,
        image_token_index=image_token_id,
        image_seq_length=num_image_tokens(backbone, fuser),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        fuser=fuser.config,
        prompt_template=prompt_template,
    )
    with torch.device(llm.device):
        model = FusedLlavaForConditionalGeneration(config, _Parts(backbone, fuser, llm.get_decoder()))
    model.lm_head.weight = llm.get_output_embeddings().weight
    model.generation_config = llm.generation_config
    # The new config made every part forget its attention implementation.
    llm.set_attn_implementation(attention)
    # Not the language model: its rotary table has to stay float32.
    for part in (model.model.vision_tower, model.model.fuser, model.model.multi_modal_projector):
        part.to(dtype or llm.dtype)
    return model


def num_image_tokens(backbone: Backbone, fuser: Fuser) -> int:
    """Tokens one image takes up in the text."""
    return fuser.num_tokens((backbone.grid(*backbone.image_size),) * len(backbone.layers))


def learns(module: nn.Module) -> bool:
    """Tell whether any parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def _real_tensors() -> Iterator[torch.dtype]:
    """Build on the CPU in float32 whatever `from_pretrained` set; yields the dtype to convert to.

    It builds on the meta device. Libraries compute buffers that no checkpoint holds (rotary tables, position ids) in
    their constructors; on the meta device these would be lost.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield dtype
    finally:
        torch.set_default_dtype(dtype)


def _keep_as_built(module: nn.Module) -> None:
    """Keep transformers from initialising a module anew, and remember the buffers that no checkpoint holds."""
    for child in module.modules():
        child._is_hf_initialized = True  # type: ignore[assignment]
        buffers = {name: child._buffers[name] for name in child._non_persistent_buffers_set if name in child._buffers}
        child._kept_buffers = {  # type: ignore[assignment]
            name: buffer.detach().clone() for name, buffer in buffers.items() if buffer is not None
        }


AutoConfig.register("layerfuse_vision", LayerfuseVisionConfig, exist_ok=True)
AutoConfig.register("layerfuse_llava", FusedLlavaConfig, exist_ok=True)
AutoModel.register(LayerfuseVisionConfig, LayerfuseVisionModel, exist_ok=True)
AutoModel.register(FusedLlavaConfig, FusedLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(FusedLlavaConfig, FusedLlavaForConditionalGeneration, exist_ok=True)
