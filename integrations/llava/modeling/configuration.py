"""The config.json of a checkpoint: that of the whole model, and that of the backbone inside."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from integrations.llava.image_layout import ImageLayout, layout_from_config
from layerfuse.errors import InputError
from layerfuse.fusers import fuser_from_config

__all__ = ["FusedLlavaConfig", "LayerfuseVisionConfig"]


class LayerfuseVisionConfig(PreTrainedConfig):
    """A backbone's config, as transformers stores configs.

    Attributes:
        backbone: `Backbone.config`, or `BackboneGroup.config`.
        hidden_size: width C of its maps; of several backbones the largest.
        image_size: (height, width) in pixels; of several backbones the largest.
    """

    model_type = "layerfuse_vision"
    backbone: dict[str, Any] | None = None
    hidden_size: int | None = None
    image_size: list[int] | None = None


class FusedLlavaConfig(LlavaConfig):
    """LLaVA's config with a fuser and the prompt template the model was trained with.

    Attributes:
        fuser: `Fuser.config`.
        image_layout: `ImageLayout.config`; None as models have it that 0.1 wrote, whose images all take
            `image_seq_length` tokens.
        head: fields of `HeadSettings`; None for a product alone, as models have it that 0.1 wrote.
        injection: fields of `InjectionConfig`, taps numbered from 0 on; None for a model that injects nothing.
        prompt_template: `Template.to_dict()`; what the model expects to read.
    """

    model_type = "layerfuse_llava"
    fuser: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    injection: dict[str, Any] | None = None
    prompt_template: dict[str, Any] | None = None
    image_layout: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check that what transformers' tools read is what the layout says of an image of the model's own size."""
        super().__post_init__(**kwargs)
        own = self.layout.num_tokens() if self.image_layout is not None else self.image_seq_length
        if own != self.image_seq_length:
            raise InputError(
                f"image_seq_length is {self.image_seq_length}, but by image_layout={self.image_layout} an image takes "
                f"{own} tokens; give both alike."
            )

    @property
    def layout(self) -> ImageLayout:
        """The layout, which says how many tokens an image takes."""
        described = self.image_layout or {"name": "fixed", "tokens_per_image": self.image_seq_length}
        return layout_from_config(described, image_token_id=self.image_token_index)

    @property
    def reads_questions(self) -> bool:
        """Whether the fuser is told what is asked about an image."""
        if self.fuser is None:
            return False
        with torch.device("meta"):
            return fuser_from_config(self.fuser).condition_channels is not None


AutoConfig.register("layerfuse_vision", LayerfuseVisionConfig, exist_ok=True)
AutoConfig.register("layerfuse_llava", FusedLlavaConfig, exist_ok=True)
