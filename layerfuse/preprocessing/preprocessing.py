"""From a PIL image to the (3, height, width) tensor that a backbone was pretrained on.

Size, statistics, interpolation and the way to reach the size come from each model's own pretrained config; the backbone
families read them. Resampling is Pillow's, as in the pipelines that the models were trained with; Pillow 13 rounds
bicubic resampling otherwise than 10 to 12 do, so values agree within one grey level across versions. ``pad`` is the
pad-to-square of LLaVA-1.5 (arXiv:2310.03744): nothing is cropped, the border has the mean colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image

from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.preprocessing.channels import as_channel_arrays, threes
from layerfuse.preprocessing.pixels import Images, Picture, as_pictures, to_rgb, upright
from layerfuse.registry import unknown_name_message

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Geometry",
    "Interpolation",
    "Mode",
    "Preprocessing",
    "check_pixels",
    "interpolation_name",
    "stack_pictures",
]

Mode = Literal["crop", "squash", "pad", "border"]
Geometry = Literal["transformers", "torchvision"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Triple = tuple[float, float, float]

# Pixels of an intermediate image (4 bytes each) up to which the libraries' own order of steps is kept.
_MAX_PIXELS = 2**26

# Statistics of RGB values in [0, 1]. OpenAI's CLIP, and torchvision's for ImageNet; HALF maps to [-1, 1].
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocessing:
    """The way in which images get a backbone's size and range; change a field with ``dataclasses.replace``.

    Args:
        size: (height, width) of the result, in pixels.
        mean: of each channel, for values in [0, 1]: red, green and blue, or as many as the images have, see
            `layerfuse.preprocessing.channels`.
        std: of each channel, for values in [0, 1].
        interpolation: Pillow's resampling filter.
        mode: ``"crop"`` scales until the image covers the size, then crops the centre; ``"squash"`` changes the aspect
            ratio; ``"pad"`` first extends the shorter edge with the colour ``int(mean * 255)``, the image centred;
            ``"border"`` first scales until the image fits into the size, then extends it with ``fill``.
        crop_pct: share of each edge that the centre crop keeps, in (0, 1]; for mode ``"crop"``, and in torchvision's
            geometry for ``"squash"`` and ``"border"``.
        geometry: who decides on half pixels: ``"transformers"`` rounds them down, ``"torchvision"`` (timm and open_clip
            stand on it) to the even neighbour.
        fill: of each channel, for mode ``"border"``, 0 to 255; the mean colour if None.
        upright: turn images as their Exif data say. The published pipelines do not; `False` reads pixels as stored.

    Raises:
        ValueError: if a field has a value that is not allowed.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    mode: Mode = "crop"
    crop_pct: float = 1.0
    geometry: Geometry = "transformers"
    fill: tuple[int, ...] | None = None
    upright: bool = False

    def __post_init__(self) -> None:
        """Check the fields, and make lists (as JSON has them) tuples."""
        channels = len(tuple(self.mean))
        if channels < 1 or len(tuple(self.std)) != channels:
            raise InputError(
                f"Preprocessing mean={tuple(self.mean)} has {channels} entries, std={tuple(self.std)} has "
                f"{len(tuple(self.std))}; give one of each for every channel."
            )
        lengths = {"size": 2, "mean": channels, "std": channels} | ({} if self.fill is None else {"fill": channels})
        for name, length in lengths.items():
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
            ("geometry", self.geometry, get_args(Geometry)),
        ):
            if value not in known:
                raise InputError(unknown_name_message(f"Preprocessing {name}", value, known))

    def __call__(self, image: Picture) -> torch.Tensor:
        """Return the input tensor of a backbone, (channels, height, width) float32, made from one image.

        With three channels it is a PIL image and converted to RGB first: alpha is dropped, grey is tripled, 16 bits are
        scaled to 8. With others it is an array (height, width, channels) of uint8.

        Raises:
            TypeError: if this is no PIL image.
            ValueError: if its values have no known range (floats), or an edge has no pixel or more than 131,072.
        """
        return self.normalize(self.pixels(image))

    def pixels(self, image: Picture) -> torch.Tensor:
        """Return an image's pixels, (channels, height, width) uint8: a quarter of the bytes of `normalize`'s result.

        Raises as `__call__`.
        """
        if self.channels != 3:
            (array,) = as_channel_arrays(image, self.channels)
            return torch.cat([self._of(three).pixels(part) for part, three in threes(array)])[: self.channels]
        fitted = torch.from_numpy(np.array(self.fit(cast(Image.Image, image)), dtype=np.uint8))
        return fitted.permute(2, 0, 1).contiguous()

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bring uint8 `pixels` (..., channels, height, width) to the backbone's range, in float32, on their device.

        Every device gives the same values to the last bit, and the host does not wait for it.

        Raises:
            ValueError: if they have another dtype, of which nobody can tell what is white.
        """
        check_pixels(pixels, self.channels)
        # Filled on the device: a tensor made of Python's numbers would be copied there, and the host wait for it. A GPU
        # multiplies with the reciprocal of a number that it is given; of a tensor it takes the quotient, as a CPU.
        white, mean, std = (
            torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=pixels.device) for value in values])
            for values in ((255.0,), self.mean, self.std)
        )
        return pixels.to(torch.float32).div_(white).sub_(mean).div_(std)

    def batch(self, images: Images) -> torch.Tensor:
        """Return a batch (B, channels, height, width), float32, made of one image or several.

        Args:
            images: with three channels a PIL image, an array (height, width) or (height, width, 3), a tensor (3,
                height, width) or (1, height, width), both of uint8; with others an array (height, width, channels) or
                a tensor (channels, height, width). Several of them in any iterable, or stacked along a first dimension.

        Raises:
            TypeError: if one is no picture.
            ValueError: if there is no image, or one has values or a shape that cannot be.
        """
        return stack_pictures(self, self.pictures(images))

    def pictures(self, images: Images) -> Sequence[Picture]:
        """Return images of any kind that `batch` takes one by one, as `__call__` takes them; raises as `batch`."""
        return as_pictures(images) if self.channels == 3 else as_channel_arrays(images, self.channels)

    def fit(self, image: Image.Image) -> Image.Image:
        """Return an RGB image of ``size``, before it is rescaled and normalised; raises as `__call__`."""
        if not isinstance(image, Image.Image):
            raise InvalidTypeError(
                f"Preprocessing takes PIL images, got {type(image).__name__}; open files with PIL.Image.open, make "
                "arrays images with PIL.Image.fromarray."
            )
        rgb = to_rgb(image)
        if self.upright:
            rgb = upright(rgb)
        if self.mode == "crop":
            fitted = self._cover_and_crop(rgb)
        elif self.mode == "squash":
            covered = self.covering_size if self.geometry == "torchvision" else self.size
            fitted = self._crop(self._resize(rgb, covered))
        else:
            fitted = self._pad(rgb) if self.mode == "pad" else self._fit_into_border(rgb)
        # A caller may draw on the result.
        return fitted.copy() if fitted is image else fitted

    @property
    def covering_size(self) -> tuple[int, int]:
        """(height, width) that the scaled image covers before the centre crop, in pixels."""
        # The 1e-6 undoes the rounding of quotients such as 224 / (224 / 256).
        height, width = (math.floor(edge / self.crop_pct + 1e-6) for edge in self.size)
        return height, width

    @property
    def channels(self) -> int:
        """Channels of the images, and of the result."""
        return len(self.mean)

    def _of(self, numbers: Sequence[int]) -> Preprocessing:
        """Return the preprocessing of some of the channels, by their numbers."""
        fields = {"mean": self.mean, "std": self.std} | ({} if self.fill is None else {"fill": self.fill})
        taken: dict[str, Any] = {name: tuple(values[each] for each in numbers) for name, values in fields.items()}
        return replace(self, **taken)

    def changed(
        self, *, mode: Mode | None = None, crop_pct: float | None = None, upright: bool | None = None
    ) -> Preprocessing:
        """Return this preprocessing with other values in the fields that are given and not None."""
        given: dict[str, Any] = {"mode": mode, "crop_pct": crop_pct, "upright": upright}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them, for `from_dict`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Build a preprocessing from the dictionary that `to_dict` makes.

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
        return image.resize((width, height), resample=self._filter)

    def _pad(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        # For a square size this is LLaVA's expand2square; otherwise the canvas gets the size's aspect ratio.
        target_height, target_width = self.size
        padded_width = max(width, round(height * target_width / target_height))
        padded_height = max(height, round(width * target_height / target_width))
        colour = tuple(int(channel * 255) for channel in self.mean)
        if padded_width * height > _MAX_PIXELS and padded_width > width:
            # The canvas would be too large. Columns before rows: the same picture within two grey levels.
            turned = replace(self, size=(target_width, target_height))
            return turned._pad(image.transpose(Image.Transpose.TRANSPOSE)).transpose(Image.Transpose.TRANSPOSE)
        if padded_height > height:
            # Pillow scales along rows first, each on its own: without the border's rows, the result is the same.
            image = self._resize(image, (height, target_width))
            padded_width = width = target_width
        canvas = Image.new("RGB", (padded_width, padded_height), colour)
        canvas.paste(image, ((padded_width - width) // 2, (padded_height - height) // 2))
        return self._resize(canvas, self.size)

    def _cover_and_crop(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        box_height, box_width = self.covering_size
        if self.geometry == "torchvision" and box_height != box_width:
            ratio = min(height / box_height, width / box_width)
            covered = (round(height / ratio), round(width / ratio))
        elif box_height * width <= box_width * height:
            covered = (int(box_width * height / width), box_width)
        else:
            covered = (box_height, int(box_height * width / height))
        covered = (max(covered[0], box_height), max(covered[1], box_width))
        if covered[0] * covered[1] <= _MAX_PIXELS:
            return self._crop(self._resize(image, covered))
        return self._crop_of_long(image, covered)

    def _crop(self, image: Image.Image) -> Image.Image:
        (target_height, target_width), (width, height) = self.size, image.size
        if (height, width) == self.size:
            return image
        left, top = self._half(width - target_width), self._half(height - target_height)
        return image.crop((left, top, left + target_width, top + target_height))

    def _crop_of_long(self, image: Image.Image, covered: tuple[int, int]) -> Image.Image:
        """Return the centre crop, of which only the pixels that it is mixed from are scaled; within one grey level."""
        edges, boxes = (image.size[1], image.size[0]), []
        for edge, scaled, target in zip(edges, covered, self.size, strict=True):
            scale, first = edge / scaled, self._half(scaled - target)
            # Six pixels on either side, at either scale: more than any filter reaches.
            reach = 6 * max(scale, 1.0)
            start, end = max(0, int(first * scale - reach)), min(edge, int((first + target) * scale + reach) + 1)
            boxes.append((start, end, first * scale - start, (first + target) * scale - start))
        (top, bottom, *rows), (left, right, *columns) = boxes
        part = image.crop((left, top, right, bottom))
        size, box = (self.size[1], self.size[0]), (columns[0], rows[0], columns[1], rows[1])
        return part.resize(size, resample=self._filter, box=box)

    def _fit_into_border(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        box_height, box_width = self.covering_size
        ratio = max(height / box_height, width / box_width)
        scaled = self._resize(image, (max(1, round(height / ratio)), max(1, round(width / ratio))))
        fill = self.fill or tuple(round(255 * channel) for channel in self.mean)
        target_height, target_width = self.size
        padded_width, padded_height = max(scaled.width, target_width), max(scaled.height, target_height)
        canvas = Image.new("RGB", (padded_width, padded_height), fill)
        canvas.paste(scaled, ((padded_width - scaled.width) // 2, (padded_height - scaled.height) // 2))
        return self._crop(canvas)

    def _half(self, pixels: int) -> int:
        return round(pixels / 2) if self.geometry == "torchvision" else pixels // 2

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]


def check_pixels(pixels: torch.Tensor, channels: int) -> None:
    """Refuse what is no uint8 tensor (..., channels, height, width), with a ValueError."""
    if pixels.dtype != torch.uint8:
        raise InputError(f"pixels are {pixels.dtype}; Preprocessing.normalize takes uint8, 0 to 255, as of `pixels`.")
    if pixels.ndim < 3 or pixels.shape[-3] != channels:
        raise InputError(
            f"pixels have shape {tuple(pixels.shape)}; Preprocessing.normalize takes (..., {channels}, height, width)."
        )


def stack_pictures(prepare: Callable[[Any], torch.Tensor], pictures: Iterable[Picture]) -> torch.Tensor:
    """Return a batch (B, C, height, width) of pictures, each prepared as said; a ValueError if there are none."""
    prepared = [prepare(picture) for picture in pictures]
    if not prepared:
        raise InputError("Preprocessing.batch got no images; give at least one.")
    return torch.stack(prepared)


def interpolation_name(given: str | int, *, default: Interpolation = "bicubic") -> Interpolation:
    """Translate what pretrained configs call their filter: a name in any case, or Pillow's number.

    The default stands for what Pillow has no filter for, such as timm's ``"random"``, training with several.
    """
    name = Image.Resampling(given).name.lower() if isinstance(given, int) else given.lower()
    return cast(Interpolation, name) if name in get_args(Interpolation) else default
