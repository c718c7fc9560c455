"""The rule about the turns of a conversation: form, order, and where image tags stand; data and inference ask here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

from .templates import IMAGE_TAG, Message

__all__ = ["FORM", "alternate", "count_image_tags", "is_turn", "split_at_images", "split_system", "without_greeting"]

_ROLES = ("human", "gpt")
_SYSTEM = "system"
FORM = "{'from': 'human' | 'gpt', 'value': text}"
"""Form of a turn, for messages; the first may also be from 'system'."""


def is_turn(value: object) -> TypeGuard[Message]:
    """Whether a value has the form of a turn."""
    if not isinstance(value, Mapping):
        return False
    return value.get("from") in (*_ROLES, _SYSTEM) and isinstance(value.get("value"), str)


def split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """Text of a leading system turn, None if there is none, and the turns behind it."""
    if messages and messages[0]["from"] == _SYSTEM:
        return messages[0]["value"], messages[1:]
    return None, messages


def without_greeting(messages: Sequence[Message]) -> Sequence[Message]:
    """The turns that are written out: all but one of the model in front of the human's first."""
    _, turns = split_system(messages)
    if not turns or turns[0]["from"] != "gpt":
        return messages
    return [*messages[: len(messages) - len(turns)], *turns[1:]]


def alternate(messages: Sequence[Message]) -> bool:
    """Whether turns alternate behind a system turn, the human's first; no turns at all do not."""
    _, turns = split_system(messages)
    return bool(turns) and all(message["from"] == _ROLES[index % 2] for index, message in enumerate(turns))


def count_image_tags(messages: Sequence[Message], num_images: int) -> int:
    """Number of image tags in the human's turns, to compare with the number of images.

    With one image, several tags in one message count as one, see `split_at_images`.
    """
    tags = [message["value"].count(IMAGE_TAG) for message in messages if message["from"] == "human"]
    return sum(map(bool, tags)) if num_images == 1 else sum(tags)


def split_at_images(message: Message, num_images: int) -> list[str]:
    """Split a message at its image tags, which only the human's words have, and only where there are images.

    With one image the published rule holds: the tag goes to the front of its message, on a line of its own, and the
    message is stripped. With several images the place of a tag says which image is meant, so it stays.

    Returns:
        The texts around its image tags: k + 1 texts for k tags.
    """
    text = message["value"]
    if num_images == 0 or message["from"] != "human" or IMAGE_TAG not in text:
        return [text]
    if num_images > 1:
        return text.split(IMAGE_TAG)
    rest = text.replace(IMAGE_TAG, "").strip()
    return ["", f"\n{rest}" if rest else ""]
