"""The processor a checkpoint is saved with: transformers' LlavaProcessor around layerfuse's preprocessing.

`LayerfuseImageProcessor` computes exactly what `layerfuse.Preprocessing` does, Pillow's resampling and LLaVA's
pad-to-square with the mean colour included, so that training, `pipeline` and `generate` see the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepare images.

        Args:
            images: one, or a (nested) list: PIL images, or arrays or tensors of bytes, (height, width), (height, width,
                3), (3, height, width), or a batch of those.
            return_tensors: "pt" (as None) or "np".
            input_data_format: "channels_first" or "channels_last" of arrays; what their shape says if None.
            **options: none, unless their value is None: how images are prepared is said by `preprocessing`.

        Returns:
            `pixel_values`: (B, 3, height, width) float32.

        Raises:
            ValueError: if an option is unknown, or something is no image.
        """
        given = sorted(name for name, value in options.items() if value is not None)
        if given:
            raise InputError(
                f"{type(self).__name__} takes no option {', '.join(given)}; known are return_tensors and "
                "input_data_format. To prepare images otherwise, change its `preprocessing`."
            )
        kind = getattr(return_tensors, "value", return_tensors)
        if kind not in (None, "pt", "np"):
            raise InputError(f"return_tensors={kind!r} is not possible; give 'pt', 'np' or None.")
        if input_data_format not in (None, *_FORMATS):
            raise InputError(f"input_data_format={input_data_format!r} is unknown; give one of {', '.join(_FORMATS)}.")
        # A processor that was saved before there was a choice turns images, too.
        preprocessing = Preprocessing.from_dict({"upright": True} | self.preprocessing)
        pixels = preprocessing.batch(_flatten(images, input_data_format))
        return BatchFeature({"pixel_values": pixels.numpy() if kind == "np" else pixels})


_FORMATS = ("channels_first", "channels_last")


def _flatten(images: Any, layout: str | None) -> list[Image.Image]:
    if isinstance(images, (torch.Tensor, np.ndarray)):
        return _from_array(np.asarray(images.cpu() if isinstance(images, torch.Tensor) else images), layout)
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return [single for entry in images for single in _flatten(entry, layout)]
    if isinstance(images, (str, bytes, Path)):
        raise InputError(f"{images!r} is a name, not an image; open it first, with PIL.Image.open.")
    return [images]


def _from_array(array: np.ndarray, layout: str | None) -> list[Image.Image]:
    if array.dtype != np.uint8 or array.ndim not in (2, 3, 4):
        raise InputError(
            f"an array of {array.dtype} with shape {array.shape} is no image here; give bytes (uint8), 0 to 255, with "
            "shape (height, width), (height, width, 3), (3, height, width), or a batch of these."
        )
    if array.ndim == 4:
        return [image for single in array for image in _from_array(single, layout)]
    if array.ndim == 3:
        last = layout == "channels_last" or (layout is None and array.shape[-1] in (1, 3, 4))
        array = array if last else array.transpose(1, 2, 0)
        if array.shape[-1] not in (1, 3, 4):
            raise InputError(f"an array of shape {array.shape} has {array.shape[-1]} channels; an image has 1, 3 or 4.")
        array = array[..., 0] if array.shape[-1] == 1 else array
    return [Image.fromarray(np.ascontiguousarray(array))]


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
