"""Conversations rendered to text, ids and labels.

A conversation becomes a list of pieces (text, image, end of answer). Every piece is tokenised on its own and knows
whether it is supervised, so label spans are exact whatever a message says. Control tokens come from the template only:
`</s>` or `<image>` typed by a person is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Literal

from layerfuse.errors import InputError

from .encoder import LONG_TEXT, TextEncoder
from .templates import IGNORE_INDEX, IMAGE_TAG, Message, Template
from .turns import alternate, split_at_images, without_greeting

__all__ = ["Rendered", "render"]


@dataclass(frozen=True)
class _Piece:
    """Part of a prompt; `text` is a control token's spelling unless `kind` is "text"."""

    kind: Literal["text", "image", "end"]
    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Rendered:
    """A conversation, ready for the model but for the expansion of its image tokens.

    Attributes:
        prompt: the text, control tokens spelled out.
        input_ids: T token ids; one image token per image.
        labels: T labels: the id where it is supervised, else `IGNORE_INDEX`.
        is_cut: whether ids are missing at the end of a long text, see `render`.
    """

    prompt: str
    input_ids: list[int]
    labels: list[int]
    is_cut: bool = False

    @property
    def num_supervised(self) -> int:
        """Number of positions with a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def _text_and_images(parts: Sequence[str], before: str = "", after: str = "") -> list[_Piece]:
    texts = [*parts]
    texts[0] = before + texts[0]
    texts[-1] += after
    pieces = [_Piece("text", texts[0])]
    for text in texts[1:]:
        pieces += [_Piece("image", IMAGE_TAG), _Piece("text", text)]
    return pieces


def _answer(template: Template, encoder: TextEncoder, text: str) -> list[_Piece]:
    pieces = [_Piece("text", text + template.answer_end, supervised=True)]
    return [*pieces, _Piece("end", encoder.end_text, supervised=True)] if template.end_token else pieces


def _chat(template: Template, encoder: TextEncoder, messages: Sequence[Message], num_images: int) -> list[_Piece]:
    pieces = [_Piece("text", f"{template.system} " if template.system else "")]
    for index, message in enumerate(messages):
        parts = split_at_images(message, num_images)
        empty = parts == [""]
        if message["from"] == "human":
            # An empty message is written without blanks, as the published code does.
            before, after = (f"{template.user}:", "") if empty else (f"{template.user}: ", " ")
            pieces += _text_and_images(parts, before, after)
            continue
        pieces.append(_Piece("text", f"{template.assistant}:"))
        if not empty or index == len(messages) - 1:
            pieces += _answer(template, encoder, "" if empty else " " + parts[0])
    return pieces


def _caption(template: Template, encoder: TextEncoder, messages: Sequence[Message], num_images: int) -> list[_Piece]:
    if num_images == 0 or len(messages) > 2:
        raise InputError(
            f"template {template.name!r} writes one caption behind its image, but the conversation has {num_images} "
            f"images and {len(messages)} messages; give one question and one answer about an image, or use 'v1'."
        )
    human, *answers = messages
    num_tags = max(human["value"].count(IMAGE_TAG), 1) if num_images > 1 else 1
    images = [_Piece("image", IMAGE_TAG)] * num_tags
    return images + [piece for answer in answers for piece in _answer(template, encoder, answer["value"])]


def _merge(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Join neighbouring texts and drop empty ones; unequal supervision keeps pieces apart."""
    written = (piece for piece in pieces if piece.text or piece.kind != "text")
    merged: list[_Piece] = []
    for (kind, supervised), group in groupby(written, attrgetter("kind", "supervised")):
        run = list(group)
        merged += [_Piece("text", "".join(piece.text for piece in run), supervised)] if kind == "text" else run
    return merged


def render(
    messages: Sequence[Message],
    *,
    template: Template,
    encoder: TextEncoder,
    image_token_id: int,
    num_images: int,
    answer_next: bool = False,
    max_length: int | None = None,
) -> Rendered:
    """Write a conversation out and tokenise it.

    Args:
        messages: turns in LLaVA's format; a leading turn of the model is left out.
        template: how to write them.
        encoder: how to tokenise them.
        image_token_id: id that stands for an image.
        num_images: images that belong to the conversation; with 0, `<image>` is text.
        answer_next: end where the model's next answer begins, as generation wants it.
        max_length: positions of which no more are wanted. The ids up to there are those of the whole conversation; of
            a long text (65,536 characters) what lies behind need not be tokenised. No image is left out.

    Raises:
        ValueError: if the turns do not alternate, or the template cannot write them.
    """
    messages = without_greeting(messages)
    if not alternate(messages):
        raise InputError(
            f"the turns of a conversation are {[message['from'] for message in messages]}; they have to alternate "
            "between 'human' and 'gpt' and begin with 'human'."
        )
    write = _caption if template.caption_only else _chat
    pieces = write(template, encoder, messages, num_images)
    if answer_next and not template.caption_only:
        pieces.append(_Piece("text", f"{template.assistant}:"))
    ids, labels, at_start, is_cut = list(encoder.begin), [IGNORE_INDEX] * len(encoder.begin), True, False
    merged = _merge(pieces)
    for piece in merged:
        if piece.kind == "text":
            at_least = None if max_length is None else max(max_length - len(ids), 0)
            new = encoder(piece.text, at_start=at_start, at_least=at_least)
            is_cut |= at_least is not None and len(piece.text) > LONG_TEXT
        else:
            new = [image_token_id if piece.kind == "image" else encoder.end]
        ids += new
        labels += new if piece.supervised else [IGNORE_INDEX] * len(new)
        at_start = piece.kind == "image"
    return Rendered("".join(piece.text for piece in merged), ids, labels, is_cut)
