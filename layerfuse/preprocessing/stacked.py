"""One picture prepared for several backbones, in the channels of one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from layerfuse.errors import InputError
from layerfuse.preprocessing.pixels import Images, as_pictures
from layerfuse.preprocessing.preprocessing import Mode, Preprocessing, check_pixels, stack_pictures

__all__ = ["AnyPreprocessing", "StackedPreprocessing", "preprocessing_from_dict"]


@dataclass(frozen=True)
class StackedPreprocessing:
    """The preprocessings of several backbones, whose results lie on one another along the channels.

    A smaller one lies in the top left corner; the rest of its channels is zero.

    Args:
        parts: one for each backbone, in the order of their channels; all turn pictures upright, or none.

    Raises:
        ValueError: if there is none, or some turn pictures upright and others do not.
    """

    parts: tuple[Preprocessing, ...]

    def __post_init__(self) -> None:
        """Check the parts, and make a list (as JSON has it) a tuple."""
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise InputError("StackedPreprocessing has no parts; give the Preprocessing of each backbone.")
        if len({part.upright for part in self.parts}) > 1:
            raise InputError(
                "the backbones of one group disagree whether pictures are turned upright; set `upright` of every "
                "backbone's preprocessing alike."
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result, in pixels: the largest of the parts."""
        heights, widths = zip(*(part.size for part in self.parts), strict=True)
        return max(heights), max(widths)

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return sum(part.channels for part in self.parts)

    @property
    def upright(self) -> bool:
        """Whether pictures are turned as their Exif data say."""
        return self.parts[0].upright

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the input tensor of the backbones, (channels, height, width) float32, made from one picture.

        Raises as `Preprocessing.__call__`.
        """
        return self.normalize(self.pixels(image))

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Return a picture's pixels for the backbones, (channels, height, width) uint8; raises as `__call__`."""
        return self._stacked([part.pixels(image) for part in self.parts])

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bring uint8 `pixels` (..., channels, height, width) to the backbones' ranges, as `Preprocessing.normalize`.

        Raises:
            ValueError: if they have another dtype, number of channels or size.
        """
        check_pixels(pixels, self.channels)
        if tuple(pixels.shape[-2:]) != self.size:
            raise InputError(
                f"pixels have shape {tuple(pixels.shape)}, and those of several backbones are {self.size[0]} x "
                f"{self.size[1]} (height x width), as StackedPreprocessing.pixels makes them."
            )
        channels = pixels.split([part.channels for part in self.parts], dim=-3)
        return self._stacked(
            [
                part.normalize(own[..., : part.size[0], : part.size[1]])
                for part, own in zip(self.parts, channels, strict=True)
            ]
        )

    def _stacked(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        height, width = self.size
        padded = [F.pad(own, (0, width - own.shape[-1], 0, height - own.shape[-2])) for own in parts]
        return torch.cat(padded, dim=-3)

    def batch(self, images: Images) -> torch.Tensor:
        """Return a batch (B, channels, height, width), float32; images and errors are `Preprocessing.batch`'s."""
        return stack_pictures(self, as_pictures(images))

    def changed(
        self, *, mode: Mode | None = None, crop_pct: float | None = None, upright: bool | None = None
    ) -> StackedPreprocessing:
        """Return this preprocessing with other values, in every part, in the fields that are given and not None."""
        changed = tuple(part.changed(mode=mode, crop_pct=crop_pct, upright=upright) for part in self.parts)
        return StackedPreprocessing(changed)

    def to_dict(self) -> dict[str, Any]:
        """Return the parts as JSON can hold them, for `preprocessing_from_dict`."""
        return {"parts": [part.to_dict() for part in self.parts]}


# How pictures are prepared for one backbone, or for several.
AnyPreprocessing = Preprocessing | StackedPreprocessing


def preprocessing_from_dict(config: Mapping[str, Any], *, upright: bool = False) -> AnyPreprocessing:
    """Build what `to_dict` of `Preprocessing` or `StackedPreprocessing` describes.

    ``upright`` is for a description that does not say.

    Raises:
        ValueError: if a key is unknown or missing.
    """
    if set(config) != {"parts"}:
        return Preprocessing.from_dict({"upright": upright, **config})
    parts = config["parts"]
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Mapping) for part in parts):
        raise InputError(
            f"Preprocessing config has for 'parts' {parts!r:.80}; give a list with one config for each backbone, as "
            "Preprocessing.to_dict makes it."
        )
    return StackedPreprocessing(tuple(Preprocessing.from_dict({"upright": upright, **part}) for part in parts))
