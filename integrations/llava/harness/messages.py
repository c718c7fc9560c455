"""Messages of a chat, as harnesses write them, turned into the images and the prompt that a predictor takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from integrations.llava.prompts import IMAGE_TAG, Message
from layerfuse.errors import InputError

__all__ = ["read_messages"]

_ROLES = {"user": "human", "assistant": "gpt"}


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Message]]:
    """Turn messages into their images, PIL images or paths, and turns; each part of a message begins a line.

    A message is `{"role": "user" | "assistant", "content": text or parts}`, a part `{"type": "text", "text": …}` or
    `{"type": "image", "url": …}`. Where the words themselves have a tag `<image>` for every image, images stand there.

    Raises:
        ValueError: if a role or a kind of part is none of these: system texts (the checkpoint's template has its own),
            videos and sounds are not read.
    """
    images: list[Any] = []
    worded: list[Message] = []
    tagged: list[Message] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise InputError(
                f"a message has the role {role!r}; layerfuse_llava reads {' and '.join(_ROLES)} (the system text is "
                "the one that the model was trained with)."
            )
        texts: list[str] = []
        lines: list[str] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(part["text"])
                lines.append(part["text"])
            elif part["type"] == "image":
                images.append(part["url"])
                lines.append(IMAGE_TAG)
            else:
                raise InputError(f"a message has a part {part['type']!r}; layerfuse_llava reads texts and images.")
        worded.append({"from": _ROLES[role], "value": "\n".join(texts)})
        tagged.append({"from": _ROLES[role], "value": "\n".join(lines)})
    has_tags = sum(turn["value"].count(IMAGE_TAG) for turn in worded) == len(images)
    return images, worded if has_tags else tagged
