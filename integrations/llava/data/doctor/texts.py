"""Checks of what a sample says: the form of its turns, its image tags, its length in tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from integrations.llava._files import is_writable_text
from integrations.llava._text import printable
from integrations.llava.image_layout import ImageLayout
from integrations.llava.prompts import IGNORE_INDEX, IMAGE_TAG, Message, Template, TextEncoder, render, turns

from ..images import read_image_size
from ..places import ImagePlaces
from ..samples import Sample, image_names, linked_media, unread_media
from .findings import Fault

__all__ = ["TokenLimit", "conversation_faults", "sample_warnings"]

_CONTROL_TOKENS = re.compile(r"</?s>|<unk>|<pad>|<\|[a-z_]+\|>")


def conversation_faults(sample: Any, template: Template, places: ImagePlaces) -> Iterator[Fault]:
    """Problems of a sample's form; the sample may be anything that a data file can hold.

    Args:
        sample: to check.
        template: how it will be written out.
        places: that the images' names must not leave.
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
        elif not places.holds(name):
            yield Fault("outside_folder", f"image {printable(name)}: outside the image folder", name)
    for message in messages:
        if not turns.is_turn(message):
            yield Fault("bad_turn", f"has a turn that is not {turns.FORM}: {message!a:.80}")
            return
        if not is_writable_text(message["value"]):
            yield Fault("half_character", f"has half of a character in its text: {message['value']!a:.80}")
            return
    unread = list(unread_media(sample))
    for key, advice in unread:
        yield Fault("unread_media", f"has {printable(key)!r}, which is not read; {advice}")
    if not unread:  # else what is to be said about tags is said
        yield from _turn_faults(messages, len(names), template)


def _turn_faults(messages: Sequence[Message], num_images: int, template: Template) -> Iterator[Fault]:
    system, _ = turns.split_system(messages)
    messages = turns.without_greeting(messages)
    exchanged = len(messages) - (system is not None)
    if exchanged < 2 or not turns.alternate(messages):
        roles = ", ".join(message["from"] for message in messages) or "missing"
        yield Fault("turn_order", f"turns are {roles}; they have to alternate human, gpt, human, gpt, …")
    if system is not None and not (template.takes_system or template.caption_only):
        yield Fault("system_turn", f"has a system turn, which template {template.name!r} does not know")
    num_tags = turns.count_image_tags(messages, num_images)
    if num_tags != num_images:
        yield Fault("image_tags", f"has {num_images} images but {num_tags} {IMAGE_TAG} tags in the human's turns")
    elif template.caption_only and (num_images == 0 or exchanged != 2):
        yield Fault("caption_form", f"template {template.name!r} takes one question and one answer about an image")


def sample_warnings(sample: Sample) -> Iterator[Fault]:
    """Harmless oddities of a sample of good form: answers without text, control tokens that someone typed."""
    answers = [message["value"] for message in sample["conversations"] if message["from"] == "gpt"]
    typed = {token for message in sample["conversations"] for token in _CONTROL_TOKENS.findall(message["value"])}
    typed |= {IMAGE_TAG for answer in answers if IMAGE_TAG in answer}
    if typed:
        yield Fault("control_token", f"has {', '.join(sorted(typed))} in its text")
    if not all(map(str.strip, answers)):
        yield Fault("empty_answer", "has an answer without text")


@dataclass(frozen=True)
class TokenLimit:
    """How long a sample may be.

    Attributes:
        encoder: how texts are tokenised.
        layout: how many tokens an image takes; heads of image files are read if that depends on their size.
        max_length: positions of a sample, images included; what is longer is cut.
        upright: whether images will be turned as their Exif data say.
    """

    encoder: TextEncoder
    layout: ImageLayout
    max_length: int
    upright: bool = False

    def faults(self, sample: Sample, template: Template, places: ImagePlaces) -> Iterator[Fault]:
        """At most one fault of a sample of good form: images or all answers that would be cut off, or any end that is.

        An image that cannot be read counts as one of the model's size.
        """
        names = image_names(sample)
        rendered = render(
            sample["conversations"],
            template=template,
            encoder=self.encoder,
            image_token_id=self.layout.image_token_id,
            num_images=len(names),
            max_length=self.max_length + 1,
        )
        sizes = [
            read_image_size(places / name, upright=self.upright) if self.layout.depends_on_size else None
            for name in names
        ]
        repeats = self.layout.repeats(rendered.input_ids, sizes)
        ids, labels = np.repeat([rendered.input_ids, rendered.labels], repeats, axis=1)
        limit, length = f"max_length is {self.max_length}", f"{'at least ' * rendered.is_cut}{len(ids)} tokens"
        if (ids[self.max_length :] == self.layout.image_token_id).any():
            yield Fault("images_too_long", f"its images do not fit: it has {length}, {limit}")
        elif (labels[: self.max_length] == IGNORE_INDEX).all():
            yield Fault("nothing_supervised", f"no answer is left: it has {length}, {limit}")
        elif len(ids) > self.max_length:
            yield Fault("too_long", f"has {length}, {limit}")
