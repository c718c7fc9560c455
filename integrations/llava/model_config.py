"""What a checkpoint's config.json says: of the whole model, and of the backbone inside."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

__all__ = ["FusedLlavaConfig", "LayerfuseVisionConfig"]


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
        head: `HeadSettings.to_dict()`; None for a product alone, as models have it that 0.1 wrote.
        prompt_template: `Template.to_dict()`; what the model expects to read.
    """

    model_type = "layerfuse_llava"
    fuser: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    prompt_template: dict[str, Any] | None = None


AutoConfig.register("layerfuse_vision", LayerfuseVisionConfig, exist_ok=True)
AutoConfig.register("layerfuse_llava", FusedLlavaConfig, exist_ok=True)
