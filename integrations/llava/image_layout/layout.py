"""What every image layout promises, and the registry that a saved config chooses from by name."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from layerfuse.errors import InputError
from layerfuse.registry import Registry

__all__ = ["LAYOUTS", "ImageLayout", "ImageSize", "layout_from_config"]

ImageSize = tuple[int, int]
"""(height, width) in pixels of an image before it is prepared, upright if preparing turns it."""


@dataclass(frozen=True)
class ImageLayout(abc.ABC):
    """Base class of all layouts; a subclass is a frozen dataclass whose fields JSON can hold.

        @dataclass(frozen=True)
        class CellLayout(ImageLayout):
            name: ClassVar[str] = "cells"
            cell: int

            def num_tokens(self, image_size: ImageSize | None = None) -> int: ...

    Attributes:
        image_token_id: id that stands for an image, and for each of its positions.
        name: what a saved config calls the class.
        depends_on_size: whether images of another size take another number of tokens; where not, nobody looks sizes up.
    """

    image_token_id: int
    name: ClassVar[str]
    depends_on_size: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        LAYOUTS.register(cls.name)(cls)

    @abc.abstractmethod
    def num_tokens(self, image_size: ImageSize | None = None) -> int:
        """Number of tokens that an image takes; without its size, an image of the model's own size."""

    def num_tiles(self, image_size: ImageSize | None = None) -> int:
        """Number of times that the backbone looks at an image: 1, unless images are cut into tiles."""
        return 1

    @property
    def largest_size(self) -> ImageSize | None:
        """Size of an image that takes most tokens; None where the model's own stands for it."""
        return None

    def canvas(self, image_size: ImageSize) -> ImageSize | None:
        """(height, width) in pixels that an image is scaled into and cut into tiles; None where it stays whole."""
        return None

    def repeats(self, ids: Sequence[int], image_sizes: Sequence[ImageSize | None]) -> list[int]:
        """Number of positions that each id of a text takes: an image's tokens where one stands, else 1.

        Args:
            ids: T ids, one per image.
            image_sizes: of the text's images, in its order.

        Raises:
            ValueError: if the text has another number of image tokens than there are sizes.
        """
        found = sum(token == self.image_token_id for token in ids)
        if found != len(image_sizes):
            raise InputError(
                f"the text has {found} image tokens, and there are {len(image_sizes)} images; give one size per image, "
                "and write one image token where each image stands."
            )
        sizes = iter(image_sizes)
        return [self.num_tokens(next(sizes)) if token == self.image_token_id else 1 for token in ids]

    def expand(self, ids: Sequence[int], image_sizes: Sequence[ImageSize | None]) -> list[int]:
        """The ids of a text with each image token as often as its image takes; arguments and errors as of `repeats`."""
        repeats = self.repeats(ids, image_sizes)
        return [token for token, times in zip(ids, repeats, strict=True) for _ in range(times)]

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able description from which `layout_from_config` builds the same layout, but for the id of the token."""
        described: dict[str, Any] = json.loads(json.dumps({"name": self.name, **asdict(self)}))
        del described["image_token_id"]
        return described


LAYOUTS: Registry[ImageLayout] = Registry("image layout", group="layerfuse.image_layouts")


def layout_from_config(config: Mapping[str, Any], *, image_token_id: int) -> ImageLayout:
    """Build a layout from its `ImageLayout.config`.

    Raises:
        ValueError: if no layout has that name, or it takes other options.
    """
    options = dict(config)
    layout = LAYOUTS.get(options.pop("name", ""))
    try:
        return layout(image_token_id, **options)
    except TypeError as error:
        raise InputError(
            f"image layout {layout.name!r} cannot be built from {dict(config)!r:.200} ({error}); write what "
            "ImageLayout.config gives."
        ) from error
