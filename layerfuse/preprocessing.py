"""From a PIL image to the (3, height, width) tensor that a backbone was pretrained on.

Size, statistics, interpolation and the way to reach the size come from each model's own pretrained config; the backbone
families read them. Resampling is Pillow's, as in the pipelines that the models were trained with. ``pad`` is the
pad-to-square of LLaVA-1.5 (arXiv:2310.03744): nothing is cropped, the border has the mean colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image

from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.registry import unknown_name_message

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Interpolation",
    "Mode",
    "Preprocessing",
    "interpolation_name",
]

Mode = Literal["crop", "squash", "pad"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Triple = tuple[float, float, float]

# Statistics of RGB values in [0, 1]. OpenAI's CLIP, and torchvision's for ImageNet; HALF maps to [-1, 1].
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocessing:
    """How images are brought to a backbone's size and range; change a field with ``dataclasses.replace``.

    Args:
        size: (height, width) of the result, in pixels.
        mean: of each RGB channel, for values in [0, 1].
        std: of each RGB channel, for values in [0, 1].
        interpolation: Pillow's resampling filter.
        mode: ``"crop"`` scales until the image covers the size, then crops the centre; ``"squash"`` changes the aspect
            ratio; ``"pad"`` first extends the shorter edge with the colour ``int(mean * 255)``, the image centred.
        crop_pct: share of each edge that the centre crop keeps, in (0, 1]; for mode ``"crop"`` only.

    Raises:
        ValueError: if a field has a value that is not allowed.
    """

    size: tuple[int, int]
    mean: Triple
    std: Triple
    interpolation: Interpolation = "bicubic"
    mode: Mode = "crop"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields, and make lists (as JSON has them) tuples."""
        for name, length in (("size", 2), ("mean", 3), ("std", 3)):
            values = tuple(getattr(self, name))
            if len(values) != length:
                raise InputError(f"Preprocessing {name}={values} has {len(values)} entries; expected {length}.")
            object.__setattr__(self, name, values)
        if min(self.size) < 1:
            raise InputError(f"Preprocessing size={self.size} is empty; give (height, width) in pixels, each >= 1.")
        if min(self.std) <= 0:
            raise InputError(
                f"Preprocessing std={self.std} has an entry <= 0; give standard deviations, such as {HALF}."
            )
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"Preprocessing crop_pct={self.crop_pct} is outside (0, 1]; 1 keeps the whole short edge.")
        for name, value, known in (
            ("mode", self.mode, get_args(Mode)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in known:
                raise InputError(unknown_name_message(f"Preprocessing {name}", value, known))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Prepare one image.

        Args:
            image: of any mode and size; it is converted to RGB first (alpha is dropped, grey is tripled).

        Returns:
            (3, height, width) float32.

        Raises:
            TypeError: if this is no PIL image.
        """
        pixels = np.asarray(self.fit(image), dtype=np.uint8)
        values = torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(torch.float32) / 255
        mean = torch.tensor(self.mean, dtype=torch.float32).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(3, 1, 1)
        return ((values - mean) / std).contiguous()

    def batch(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """Prepare several images.

        Args:
            images: B images, at least one.

        Returns:
            (B, 3, height, width) float32.

        Raises:
            ValueError: if there is no image.
        """
        prepared = [self(image) for image in images]
        if not prepared:
            raise InputError("Preprocessing.batch got no images; give at least one.")
        return torch.stack(prepared)

    def fit(self, image: Image.Image) -> Image.Image:
        """Bring one image to the size; the step before rescaling and normalising.

        Args:
            image: of any mode and size.

        Returns:
            RGB image of ``size``.

        Raises:
            TypeError: if this is no PIL image.
            ValueError: if it has no pixels.
        """
        if not isinstance(image, Image.Image):
            raise InvalidTypeError(
                f"Preprocessing takes PIL images, got {type(image).__name__}; open files with PIL.Image.open, make "
                "arrays images with PIL.Image.fromarray."
            )
        if 0 in image.size:
            raise InputError(
                f"an image of {image.size[0]}x{image.size[1]} pixels (width x height) has nothing to show; look at the "
                "file or the crop that it was made from."
            )
        rgb = image.convert("RGB")
        if self.mode == "crop":
            return self._cover_and_crop(rgb)
        return self._resize(self._pad(rgb) if self.mode == "pad" else rgb, self.size)

    @property
    def covering_size(self) -> tuple[int, int]:
        """(height, width) that the scaled image covers before the centre crop, in pixels."""
        # The 1e-6 undoes the rounding of quotients such as 224 / (224 / 256).
        height, width = (math.floor(edge / self.crop_pct + 1e-6) for edge in self.size)
        return height, width

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, for `from_dict`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from `to_dict`.

        Args:
            config: fields by name.

        Returns:
            The same preprocessing.

        Raises:
            ValueError: if a key is unknown or one without a default is missing.
        """
        known = [field.name for field in fields(cls)]
        for key in config:
            if key not in known:
                raise InputError(unknown_name_message("Preprocessing key", key, known))
        missing = [name for name in ("size", "mean", "std") if name not in config]
        if missing:
            raise InputError(
                f"Preprocessing config lacks {', '.join(missing)}; it has {', '.join(config) or 'no keys'}."
            )
        return cls(**config)

    def _resize(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        height, width = size
        if image.size == (width, height):
            return image
        return image.resize((width, height), resample=Image.Resampling[self.interpolation.upper()])

    def _pad(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        # For a square size this is LLaVA's expand2square; otherwise the canvas gets the size's aspect ratio.
        target_height, target_width = self.size
        padded_width = max(width, round(height * target_width / target_height))
        padded_height = max(height, round(width * target_height / target_width))
        if (padded_width, padded_height) == image.size:
            return image
        red, green, blue = (int(channel * 255) for channel in self.mean)
        canvas = Image.new("RGB", (padded_width, padded_height), (red, green, blue))
        canvas.paste(image, ((padded_width - width) // 2, (padded_height - height) // 2))
        return canvas

    def _cover_and_crop(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        box_height, box_width = self.covering_size
        if box_height * width <= box_width * height:
            covered = (int(box_width * height / width), box_width)
        else:
            covered = (box_height, int(box_height * width / height))
        covered = (max(covered[0], box_height), max(covered[1], box_width))
        resized = self._resize(image, covered)
        target_height, target_width = self.size
        top, left = (covered[0] - target_height) // 2, (covered[1] - target_width) // 2
        return resized.crop((left, top, left + target_width, top + target_height))


def interpolation_name(given: str | int, *, default: Interpolation = "bicubic") -> Interpolation:
    """Translate what pretrained configs call their filter.

    Args:
        given: a name in any case, or Pillow's number; timm's ``"random"`` stands for training with several.
        default: for names that Pillow has no filter for.

    Returns:
        The filter's name.
    """
    name = Image.Resampling(given).name.lower() if isinstance(given, int) else given.lower()
    return cast(Interpolation, name) if name in get_args(Interpolation) else default
