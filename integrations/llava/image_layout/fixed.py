"""The layout of images that are seen once, at one size, by one backbone or several: each takes as many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerfuse.errors import InputError

from .layout import ImageLayout, ImageSize

__all__ = ["FixedLayout"]


@dataclass(frozen=True)
class FixedLayout(ImageLayout):
    """One number of tokens for every image, as in LLaVA-1.5.

    Attributes:
        tokens_per_image: that number; a model's is `Fuser.num_tokens` on the grids of the maps that the fuser reads.

    Raises:
        ValueError: if it is no number, or below 1.
    """

    name: ClassVar[str] = "fixed"
    depends_on_size: ClassVar[bool] = False
    tokens_per_image: int

    def __post_init__(self) -> None:
        """Refuse what is no number of tokens."""
        if not isinstance(self.tokens_per_image, int) or self.tokens_per_image < 1:
            raise InputError(f"tokens_per_image={self.tokens_per_image!r} is no number of tokens; give 1 or more.")

    def num_tokens(self, image_size: ImageSize | None = None) -> int:
        """Return `tokens_per_image`, whatever the size."""
        return self.tokens_per_image
