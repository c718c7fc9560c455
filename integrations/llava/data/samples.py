"""What a sample of LLaVA's format is.

A sample is `{"id": …, "image": "name.jpg" | ["a.jpg", …] (optional), "conversations": [{"from": "human" | "gpt",
"value": text}, …]}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["TEXT_ONLY", "Sample", "count_words", "image_names", "sample_id", "source_name"]

Sample = Mapping[str, Any]
"""One entry of a data file."""
TEXT_ONLY = "text only"
"""Source of the samples without image."""


def image_names(sample: Sample) -> tuple[str, ...]:
    """Names of a sample's images, in the order of their tags."""
    images = sample.get("image")
    return () if images is None else (images,) if isinstance(images, str) else tuple(images)


def sample_id(sample: Any, index: int) -> str:
    """Name a sample in messages: by its id, or by its index where it has none."""
    own = sample.get("id") if isinstance(sample, Mapping) else None
    # Half of a character could be neither shown nor written.
    return str(index if own is None else own).encode("utf-8", "backslashreplace").decode()


def source_name(image: str | None) -> str:
    """First folder of an image's name, such as coco or ocr_vqa: the data set that it comes from."""
    if image is None:
        return TEXT_ONLY
    image = image.encode("utf-8", "backslashreplace").decode()
    first, slash, _ = image.lstrip("/").partition("/")
    return first if slash else "(no folder)"


def count_words(sample: Any) -> int:
    """Words of all turns, counted as the published sampler does, at least 1.

    The number is negative for a sample without image, and 0 for anything in a data file that is no sample.
    """
    messages = sample.get("conversations") if isinstance(sample, Mapping) else None
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
        return 0
    words = max(1, sum(len(str(turn.get("value", "")).split()) for turn in messages))
    # An empty list of images is none, as `image_names` has it.
    return words if sample.get("image") not in (None, []) else -words
