"""The processor a checkpoint is saved with: transformers' LlavaProcessor around layerfuse's preprocessing.

`LayerfuseImageProcessor` computes exactly what `layerfuse.Preprocessing` does, Pillow's resampling and LLaVA's
pad-to-square with the mean colour included, so that training, `pipeline` and `generate` see the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from layerfuse.errors import InputError
from layerfuse.preprocessing import Preprocessing

from .model import FusedLlavaForConditionalGeneration, LayerfuseVisionConfig
from .prompts import IMAGE_TAG, Template, chat_template

__all__ = ["LayerfuseImageProcessor", "add_image_token", "build_processor"]


class LayerfuseImageProcessor(BaseImageProcessor):
    """layerfuse's preprocessing as an image processor of transformers.

    Args:
        preprocessing: `Preprocessing.to_dict()`; its `upright` says whether images are turned by their Exif data.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  (transformers reads and writes it like this)

    def __init__(self, preprocessing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if preprocessing is None:
            raise InputError("LayerfuseImageProcessor needs preprocessing=..., as Preprocessing.to_dict() gives it.")
        self.preprocessing = preprocessing
        height, width = preprocessing["size"]
        # Tools that count image tokens without preparing an image read this.
        self.crop_size = {"height": height, "width": width}

    def preprocess(self, images: Any, **_: Any) -> BatchFeature:
        """Prepare images.

        Args:
            images: one, or a (nested) list: PIL images, or arrays (height, width, 3) of bytes.

        Returns:
            `pixel_values`: (B, 3, height, width) float32, as a tensor.
        """
        # A processor that was saved before there was a choice turns images, too.
        pixels = Preprocessing.from_dict({"upright": True} | self.preprocessing).batch(_flatten(images))
        return BatchFeature({"pixel_values": pixels})


def _flatten(images: Any) -> list[Image.Image]:
    if isinstance(images, np.ndarray):
        return [Image.fromarray(images)]
    if isinstance(images, Sequence):
        return [single for entry in images for single in _flatten(entry)]
    return [images]


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make sure the tokenizer has `<image>` and a padding token.

    Args:
        tokenizer: changed in place. Padding falls back on the unknown token, as in the published code.

    Returns:
        The id of `<image>`.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token is not None else tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]})
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    assert isinstance(image_token_id, int)
    return image_token_id


def build_processor(
    model: FusedLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    preprocessing: Preprocessing,
    template: Template,
) -> LlavaProcessor:
    """Assemble the processor that belongs to a model.

    Args:
        model: says how many positions an image takes up.
        tokenizer: has `<image>`; it is set to pad on the left, as generation in batches needs it.
        preprocessing: how images are prepared; at inference they are turned upright, whatever training did.
        template: written into the chat template.

    Returns:
        The processor; `save_pretrained` and `AutoProcessor.from_pretrained` keep it.
    """
    tokenizer.padding_side = "left"
    # Tokenizers save what they were built with, and the side is lost unless it is one of these.
    tokenizer.init_kwargs["padding_side"] = "left"
    height, width = preprocessing.size
    patch_size = max(height, width)
    # LlavaProcessor counts (height // patch) * (width // patch) + additional tokens; any fuser's number fits that way.
    grid_tokens = (height // patch_size) * (width // patch_size)
    return LlavaProcessor(
        image_processor=LayerfuseImageProcessor(replace(preprocessing, upright=True).to_dict()),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=model.config.image_seq_length - grid_tokens,
        chat_template=chat_template(template, tokenizer),
        image_token=IMAGE_TAG,
    )


# One implementation for both backends: it is layerfuse that resamples.
AutoImageProcessor.register(
    LayerfuseVisionConfig,
    image_processor_classes={"pil": LayerfuseImageProcessor, "torchvision": LayerfuseImageProcessor},
    exist_ok=True,
)
