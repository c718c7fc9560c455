"""Checks of what a sample says: the form of its turns, its image tags, its length in tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from integrations.llava._files import is_writable_text
from integrations.llava._text import printable
from integrations.llava.image_layout import ImageLayout
from integrations.llava.prompts import IGNORE_INDEX, IMAGE_TAG, Rendered, Template, TextEncoder, render

from ..media_names import is_outside, linked_media, unread_media
from ..samples import Sample, image_names
from .findings import Fault

__all__ = ["TokenLimit", "conversation_faults", "is_outside", "sample_warnings"]

_CONTROL_TOKENS = re.compile(r"</?s>|<unk>|<pad>|<\|[a-z_]+\|>")


def conversation_faults(sample: Any, template: Template, image_folder: str | Path) -> Iterator[Fault]:
    """Check a sample's form.

    Args:
        sample: anything that a data file can hold.
        template: how it will be written out.
        image_folder: that the images' names must not leave.

    Yields:
        Its problems.
    """
    if not isinstance(sample, Mapping):
        yield Fault("not_an_object", f"is a {type(sample).__name__}, so it has no 'conversations'")
        return
    messages = sample.get("conversations")
    if not isinstance(messages, list) or not messages:
        yield Fault("no_conversation", "has no 'conversations', a list of turns")
        return
    image = sample.get("image")
    names = [image] if isinstance(image, str) else [] if image is None else image
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        yield Fault("bad_image_entry", f"has the image entry {str(image)[:80]!a}; give a file name, several, or none")
        return
    for name in names:
        if (link := linked_media(name)) is not None:
            yield Fault("linked_image", f"image {printable(name)[:120]}: {link}, no file name")
        elif is_outside(name, image_folder):
            yield Fault("outside_folder", f"image {printable(name)}: outside the image folder", name)
    for turn in messages:
        if not (
            isinstance(turn, Mapping) and turn.get("from") in ("human", "gpt") and isinstance(turn.get("value"), str)
        ):
            yield Fault("bad_turn", f"has a turn that is not {{'from': 'human' | 'gpt', 'value': text}}: {turn!a:.80}")
            return
        if not is_writable_text(turn["value"]):
            yield Fault("half_character", f"has half of a character in its text: {turn['value']!a:.80}")
            return
    found = list(unread_media(sample))
    for key, advice in found:
        yield Fault("unread_media", f"has {printable(key)!r}, which is not read; {advice}")
    if found:
        return  # what is to be said about tags is said
    yield from _turn_faults(messages, len(names), template)


def _turn_faults(messages: Sequence[Mapping[str, str]], num_images: int, template: Template) -> Iterator[Fault]:
    turns = messages[1:] if messages[0]["from"] == "gpt" else messages
    roles = [turn["from"] for turn in turns]
    if len(roles) < 2 or roles != (["human", "gpt"] * len(roles))[: len(roles)]:
        yield Fault(
            "turn_order", f"turns are {', '.join(roles) or 'missing'}; they have to alternate human, gpt, human, gpt, …"
        )
    tags = [turn["value"].count(IMAGE_TAG) for turn in turns if turn["from"] == "human"]
    # With one image, several tags in one message count as one: they are moved to its front.
    found = sum(map(bool, tags)) if num_images == 1 else sum(tags)
    if found != num_images:
        yield Fault("image_tags", f"has {num_images} images but {found} {IMAGE_TAG} tags in the human's turns")
    elif template.caption_only and (num_images == 0 or len(turns) != 2):
        yield Fault("caption_form", f"template {template.name!r} takes one question and one answer about an image")


def sample_warnings(sample: Sample) -> Iterator[Fault]:
    """Look for what is odd but harmless in a sample of good form.

    Yields:
        Answers without text, control tokens that someone typed.
    """
    turns = sample["conversations"]
    typed = {token for turn in turns for token in _CONTROL_TOKENS.findall(turn["value"])}
    typed |= {IMAGE_TAG for turn in turns if turn["from"] == "gpt" and IMAGE_TAG in turn["value"]}
    if typed:
        yield Fault("control_token", f"has {', '.join(sorted(typed))} in its text")
    if any(turn["from"] == "gpt" and not turn["value"].strip() for turn in turns):
        yield Fault("empty_answer", "has an answer without text")


@dataclass(frozen=True)
class TokenLimit:
    """How long a sample may be.

    Attributes:
        encoder: how texts are tokenised.
        layout: how many tokens an image takes; images are counted with the model's own size.
        max_length: positions of a sample, images included; what is longer is cut.
    """

    encoder: TextEncoder
    layout: ImageLayout
    max_length: int

    def faults(self, sample: Sample, template: Template) -> Iterator[Fault]:
        """Check the length of a sample of good form.

        Yields:
            At most one fault: images or all answers that would be cut off, or any end that is.
        """
        num_images = len(image_names(sample))
        rendered: Rendered = render(
            sample["conversations"],
            template=template,
            encoder=self.encoder,
            image_token_id=self.layout.image_token_id,
            num_images=num_images,
            max_length=self.max_length + 1,
        )
        repeats = self.layout.repeats(rendered.input_ids, [None] * num_images)
        ids, labels = np.repeat([rendered.input_ids, rendered.labels], repeats, axis=1)
        limit, length = f"max_length is {self.max_length}", f"{'at least ' * rendered.is_cut}{len(ids)} tokens"
        if (ids[self.max_length :] == self.layout.image_token_id).any():
            yield Fault("images_too_long", f"its images do not fit: it has {length}, {limit}")
        elif (labels[: self.max_length] == IGNORE_INDEX).all():
            yield Fault("nothing_supervised", f"no answer is left: it has {length}, {limit}")
        elif len(ids) > self.max_length:
            yield Fault("too_long", f"has {length}, {limit}")
