"""The processor a checkpoint is saved with: transformers' LlavaProcessor around layerfuse's preprocessing and layout.

Images are prepared exactly as `layerfuse.Preprocessing` does, so that training, `pipeline` and `generate` see the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData

from integrations.llava.image_layout import AnyResLayout, ImageLayout, layout_from_config
from integrations.llava.prompts import IMAGE_TAG, Template, chat_template
from layerfuse.errors import InputError
from layerfuse.preprocessing import AnyPreprocessing, prepare_tiles, preprocessing_from_dict
from layerfuse.preprocessing.pixels import image_size

from .model import FusedLlavaConfig, FusedLlavaForConditionalGeneration, LayerfuseVisionConfig

__all__ = ["FusedLlavaProcessor", "LayerfuseImageProcessor", "add_image_token", "build_processor"]


class LayerfuseImageProcessor(BaseImageProcessor):
    """layerfuse's preprocessing as an image processor of transformers.

    Args:
        preprocessing: `Preprocessing.to_dict()`, or `StackedPreprocessing.to_dict()` for several backbones; its
            `upright` says whether images are turned by their Exif data.
        image_layout: `ImageLayout.config` of the model that the images are for; None says nothing, as processors that
            0.1 saved.
    """

    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012  (transformers reads and writes it like this)

    def __init__(
        self, preprocessing: dict[str, Any] | None = None, image_layout: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if preprocessing is None:
            raise InputError("LayerfuseImageProcessor needs preprocessing=..., as Preprocessing.to_dict() gives it.")
        self.preprocessing = preprocessing
        self.image_layout = image_layout
        saved = {name: value for name, value in kwargs.items() if name in _SAVED or value == getattr(self, name, None)}
        self._refuse(kwargs.keys() - saved.keys())
        saved.pop("crop_size", None)
        super().__init__(**saved)

    @property
    def crop_size(self) -> dict[str, int]:
        """Height and width of a prepared image; tools that count image tokens without preparing one read this."""
        height, width = preprocessing_from_dict(self.preprocessing).size
        return {"height": height, "width": width}

    @property
    def layout(self) -> ImageLayout | None:
        """The layout, if images are cut into tiles; it knows no image token."""
        described = self.image_layout or {}
        is_tiled = described.get("name") == AnyResLayout.name
        return layout_from_config(described, image_token_id=-1) if is_tiled else None

    def to_dict(self) -> dict[str, Any]:
        """Describe the processor, its crop size with it, so that JSON can hold it."""
        return {**super().to_dict(), "crop_size": self.crop_size}

    def _refuse(self, options: Iterable[str]) -> None:
        if given := sorted(options):
            raise InputError(
                f"{type(self).__name__} takes no option {', '.join(given)}; known are return_tensors, "
                "input_data_format and device. To prepare images otherwise, change its `preprocessing`."
            )

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepare images.

        Args:
            images: one, or a (nested) list: PIL images, or arrays or tensors of bytes, (height, width), (height, width,
                3), (3, height, width), or a batch of those.
            return_tensors: "pt" (as None) or "np".
            input_data_format: "channels_first" or "channels_last" of arrays; what their shape says if None.
            device: where tensors go; the CPU if None.
            **options: none, unless their value is None: how images are prepared is said by `preprocessing`.

        Returns:
            `pixel_values`: (B, channels, height, width) float32, or (B, most tiles, channels, height, width), filled up
            with zeros, where images are cut into tiles; `image_sizes`: (B, 2) height and width before that.

        Raises:
            ValueError: if an option is unknown, or something is no image.
        """
        self._refuse(name for name, value in options.items() if value is not None)
        kind = getattr(return_tensors, "value", return_tensors)
        if kind not in (None, "pt", "np"):
            raise InputError(f"return_tensors={kind!r} is not possible; give 'pt', 'np' or None.")
        if input_data_format not in (None, *_FORMATS):
            raise InputError(f"input_data_format={input_data_format!r} is unknown; give one of {', '.join(_FORMATS)}.")
        # A processor that was saved before there was a choice turns images, too.
        preprocessing = preprocessing_from_dict(self.preprocessing, upright=True)
        flat = _flatten(images, input_data_format)
        sizes = [image_size(image, upright=preprocessing.upright) for image in flat]
        layout = self.layout
        if layout is None:
            pixels = preprocessing.batch(flat)
        else:
            images = zip(flat, sizes, strict=True)
            tiles = [prepare_tiles(image, preprocessing, layout.canvas(size)) for image, size in images]
            pixels = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
        prepared = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        return BatchFeature({name: own.numpy() if kind == "np" else own.to(device) for name, own in prepared.items()})


class FusedLlavaProcessor(LlavaProcessor):
    """transformers' LlavaProcessor, which asks the model's layout how many tokens an image takes."""

    @property
    def layout(self) -> ImageLayout:
        """The layout, which says how many tokens an image takes."""
        return layout_from_config(self.image_processor.image_layout or {}, image_token_id=self.image_token_id)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """Write the tokens of one of the images that were prepared."""
        height, width = image_inputs["image_sizes"][image_idx].tolist()
        text: str = self.image_token * self.layout.num_tokens((height, width))
        return text

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **_: Any
    ) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        numbers = [self.layout.num_tokens((height, width)) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=numbers, num_image_patches=[1] * len(numbers))


# Keys in the file of a saved processor that say nothing about images.
_SAVED = ("image_processor_type", "processor_class", "auto_map")
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
    """Make sure the tokenizer, changed in place, has `<image>`, whose id is returned, and a padding token.

    Padding falls back on the unknown token, as in the published code.
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
    preprocessing: AnyPreprocessing,
    template: Template,
) -> FusedLlavaProcessor:
    """Assemble the processor that belongs to a model, and that `AutoProcessor.from_pretrained` reads again.

    The tokenizer, which has `<image>`, is set to pad on the left, as generation in batches needs it. Images are turned
    upright at inference, whatever training did.
    """
    tokenizer.padding_side = "left"
    # Tokenizers save what they were built with, and the side is lost unless it is one of these.
    tokenizer.init_kwargs["padding_side"] = "left"
    described = model.config.layout.config
    return FusedLlavaProcessor(
        image_processor=LayerfuseImageProcessor(preprocessing.changed(upright=True).to_dict(), described),
        tokenizer=tokenizer,
        chat_template=chat_template(template, tokenizer),
        image_token=IMAGE_TAG,
    )


AutoProcessor.register(FusedLlavaConfig, FusedLlavaProcessor, exist_ok=True)
# One implementation for both backends: it is layerfuse that resamples.
AutoImageProcessor.register(
    LayerfuseVisionConfig,
    image_processor_classes={"pil": LayerfuseImageProcessor, "torchvision": LayerfuseImageProcessor},
    exist_ok=True,
)
