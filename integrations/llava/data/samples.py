"""What a sample of LLaVA's format is, and how it names images and what is none.

A sample is `{"id": …, "image": "name.jpg" | ["a.jpg", …] (optional), "conversations": [{"from": "human" | "gpt",
"value": text}, …]}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from integrations.llava.prompts import IMAGE_TAG

__all__ = [
    "TEXT_ONLY",
    "Sample",
    "count_words",
    "image_names",
    "is_media_key",
    "is_video",
    "linked_media",
    "sample_id",
    "source_name",
    "unread_media",
]

Sample = Mapping[str, Any]
"""One entry of a data file."""
TEXT_ONLY = "text only"
"""Source of the samples without image."""

_FRAMES = "images alone are read: give the frames as 'image': [name, …], or remove the sample"
_VIDEO_TAG = re.compile(r"^\s*<video>|\n<video>\s*$")
_LINK = re.compile(r"(data:|[a-z][a-z0-9+.-]+://)", re.IGNORECASE)
_IMAGE_KEY = re.compile(r"(image|img|picture|photo|pic)s?(file|path|filename|name|url|uri|list)?s?")
_OTHER_KEY = re.compile(r"(video|audio|movie|clip|frame)s?(file|path|filename|name|url|uri|list)?s?|media|multimedia")


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


def linked_media(name: str) -> str | None:
    """What an image's name is that stands for no file: a URL, or the picture itself; None for a file's name."""
    found = _LINK.match(name)
    if found is None:
        return None
    return "is the picture itself (data:)" if found[1].lower() == "data:" else "is a URL"


def is_media_key(key: str) -> bool:
    """Whether a key looks as if it held media."""
    letters = re.sub(r"[^a-z]", "", key.lower())
    return _IMAGE_KEY.fullmatch(letters) is not None or _OTHER_KEY.fullmatch(letters) is not None


def is_video(name: str) -> bool:
    """Whether a file's name ends as those of videos do."""
    return name.lower().endswith((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv"))


def unread_media(sample: Sample) -> Iterator[tuple[str, str]]:
    """Keys of a sample and its turns that look like media and are not read, each with what to write instead.

    Videos are named, too: a file's name, or the tag `<video>` at the beginning or end of a turn. Beside an `image`,
    other keys about images are notes (`image_id`, `image_url`), as long as its tags are as many.
    The sample is of good form, but for its tags.
    """
    names = image_names(sample)
    num_images = len(names)
    num_tags = sum(turn["value"].count(IMAGE_TAG) for turn in sample["conversations"] if turn["from"] == "human")
    unseen = num_images == 0 or num_images < num_tags
    for key, value in sample.items():
        if key != "image" and _names_media(_OTHER_KEY, key, value):
            yield key, _FRAMES
        elif key != "image" and unseen and _names_media(_IMAGE_KEY, key, value):
            yield key, f"write 'image': {_example(value)}"
    for turn in sample["conversations"] if unseen else ():
        for key, value in turn.items():
            if _names_media(_IMAGE_KEY, key, value) or _names_media(_OTHER_KEY, key, value):
                yield key, f"write 'image': {_example(value)} beside 'conversations'"
    for name in filter(is_video, names):
        yield name, _FRAMES
    # In a text about web pages the word may stand anywhere.
    if any(_VIDEO_TAG.search(turn["value"]) for turn in sample["conversations"] if turn["from"] == "human"):
        yield "<video>", _FRAMES


def _names_media(pattern: re.Pattern[str], key: str, value: Any) -> bool:
    """Whether a key of that pattern holds a file's name, or several; numbers and empty values are notes."""
    if not pattern.fullmatch(re.sub(r"[^a-z]", "", key.lower())):
        return False
    if isinstance(value, list):
        return any(_names_media(pattern, key, entry) for entry in value)
    return bool(value) and isinstance(value, str | Mapping)


def _example(value: Any) -> str:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and len(name) < 60 for name in names):
        return "name"
    return ascii(names[0]) if len(names) == 1 else f"[{names[0]!a}, …]"
