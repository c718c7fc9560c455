"""Prompt templates as data: those of LLaVA-1.5 (arXiv:2310.03744)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerfuse.errors import InputError
from layerfuse.registry import unknown_name_message

__all__ = ["IGNORE_INDEX", "IMAGE_TAG", "TEMPLATES", "Message", "Template", "get_template"]

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""
IMAGE_TAG = "<image>"
"""Marks an image's place in a message."""

Message = Mapping[str, str]
"""A turn in LLaVA's format: {"from": "human" | "gpt", "value": text}."""


@dataclass(frozen=True)
class Template:
    """How a conversation is written out.

    Attributes:
        name: what recipes and checkpoints call it.
        system: text before the first turn.
        user: name of the human's role.
        assistant: name of the model's role.
        answer_end: text after every answer; supervised.
        end_token: whether the tokenizer's end-of-sequence token closes every answer; supervised.
        caption_only: leave out the human's words, the system text and the roles: images, answer, nothing else.
    """

    name: str
    system: str = ""
    user: str = "USER"
    assistant: str = "ASSISTANT"
    answer_end: str = ""
    end_token: bool = True
    caption_only: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Describe the template so that JSON can hold it."""
        return dataclasses.asdict(self)


_V1 = Template(
    name="v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
)
TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        _V1,
        dataclasses.replace(_V1, name="llava_v1", system=_V1.system.replace("user", "human")),
        dataclasses.replace(_V1, name="brief", system=""),
        Template(name="plain", answer_end="\n", end_token=False, caption_only=True),
    )
}
"""`v1`: vicuna, as LLaVA-1.5 finetunes. `llava_v1`: the same about a "human". `brief`: v1 without system text. `plain`:
captions, as LLaVA-1.5 pretrains."""


def get_template(name: str) -> Template:
    """Look a template up.

    Raises:
        ValueError: if no template has that name; the message gives the nearest match and the full list.
    """
    if name not in TEMPLATES:
        raise InputError(unknown_name_message("prompt template", name, TEMPLATES))
    return TEMPLATES[name]
