"""Conversations rendered to text, ids and labels.

A conversation becomes a list of pieces (text, image, control token). Every piece is tokenised on its own and knows
whether it is supervised, so label spans are exact whatever a message says. Control tokens come from the template only:
`</s>` or `<image>` typed by a person is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Literal

from layerfuse.errors import InputError

from .encoder import LONG_TEXT, TextEncoder
from .templates import BOS, IGNORE_INDEX, IMAGE_TAG, Message, Template
from .turns import alternate, split_at_images, split_system, without_greeting

__all__ = ["Rendered", "render"]


@dataclass(frozen=True)
class _Piece:
    """Part of a prompt; `text` of a control token is as patterns spell it."""

    kind: Literal["text", "image", "control"]
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


def _text_and_images(texts: Sequence[str]) -> list[_Piece]:
    pieces = [_Piece("text", texts[0])]
    for text in texts[1:]:
        pieces += [_Piece("image", IMAGE_TAG), _Piece("text", text)]
    return pieces


def _fill(
    template: Template, pattern: str, text: Sequence[_Piece] = (), system: Sequence[_Piece] = (), *, empty: bool = False
) -> list[_Piece]:
    """Write a pattern out around a message."""
    pieces: list[_Piece] = []
    for part in template.parts(pattern, empty=empty):
        if part in ("{text}", "{system}"):
            pieces += text if part == "{text}" else system
        else:
            pieces.append(_Piece("control" if template.is_control(part) else "text", part))
    return pieces


def _answer(template: Template, text: str) -> list[_Piece]:
    pieces = _fill(template, "answer", [_Piece("text", text)], empty=not text)
    return [replace(piece, supervised=True) for piece in pieces]


def _chat(template: Template, messages: Sequence[Message], num_images: int, *, answer_next: bool) -> list[_Piece]:
    text, turns = split_system(messages)
    if text is not None and not template.takes_system:
        raise InputError(
            f"template {template.name!r} knows no system turn, and the conversation has one; move its text into the "
            "first question, or take another template."
        )
    text = template.system if text is None else template.written("system", text)
    system = [] if text is None else _fill(template, "system_turn", [_Piece("text", text)])
    pieces = _fill(template, "begin", system=system)
    last = len(turns) - 1
    for index, message in enumerate(turns):
        written = {**message, "value": template.written(message["from"], message["value"])}
        if message["from"] == "human":
            texts = split_at_images(written, num_images)
            shown = _text_and_images(texts)
            pieces += _fill(template, "user_turn", shown, system if index == 0 else (), empty=texts == [""])
            if index < last or answer_next:
                pieces += _fill(template, "prompt")
            if index == last - (not answer_next):
                pieces += _fill(template, "last_prompt")
        elif written["value"] or not template.drop_empty or index == last:
            pieces += _answer(template, written["value"])
            pieces += _fill(template, "after_answer") if index < last else []
    return pieces


def _caption(template: Template, messages: Sequence[Message], num_images: int) -> list[_Piece]:
    _, (human, *answers) = split_system(messages)
    if num_images == 0 or len(answers) > 1:
        raise InputError(
            f"template {template.name!r} writes one caption behind its image, but the conversation has {num_images} "
            f"images and {1 + len(answers)} messages; give one question and one answer about an image, or use 'v1'."
        )
    num_tags = max(human["value"].count(IMAGE_TAG), 1) if num_images > 1 else 1
    images = [_Piece("image", IMAGE_TAG)] * num_tags
    return images + [piece for answer in answers for piece in _answer(template, answer["value"])]


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
            "between 'human' and 'gpt' and begin with 'human', behind a turn of 'system' at most."
        )
    if template.caption_only:
        pieces = _caption(template, messages, num_images)
    else:
        pieces = _chat(template, messages, num_images, answer_next=answer_next)
    merged = _merge(pieces)
    ids, labels, is_cut = _encode(merged, encoder, image_token_id, max_length)
    prompt = "".join(encoder.spelling(piece.text) if piece.kind == "control" else piece.text for piece in merged)
    return Rendered(prompt, ids, labels, is_cut)


def _encode(
    pieces: Sequence[_Piece], encoder: TextEncoder, image_token_id: int, max_length: int | None
) -> tuple[list[int], list[int], bool]:
    """Tokenise pieces; ids, labels, and whether ids of a long text are missing."""
    ids, labels, is_cut = list(encoder.begin), [IGNORE_INDEX] * len(encoder.begin), False
    at_start, eats = True, False
    for place, piece in enumerate(pieces):
        if piece.kind == "text":
            text = piece.text.lstrip() if eats else piece.text
            if any(_eats(behind, "before", encoder) for behind in pieces[place + 1 : place + 2]):
                text = text.rstrip()
            at_least = None if max_length is None else max(max_length - len(ids), 0)
            new = encoder(text, at_start=at_start, at_least=at_least)
            is_cut |= at_least is not None and len(text) > LONG_TEXT
            eats = eats and not text
        elif piece.kind == "image":
            new, eats = [image_token_id], False
        else:
            # The tokenizer may have written a text's first token already.
            is_written = piece.text == BOS and not place and encoder.begin
            new, eats = [] if is_written else encoder.control(piece.text), _eats(piece, "behind", encoder)
        ids += new
        labels += new if piece.supervised else [IGNORE_INDEX] * len(new)
        # Behind an image the published code tokenises afresh, and a text's first token begins another text.
        at_start = piece.kind == "image" or piece.text == BOS
    return ids, labels, is_cut


def _eats(piece: _Piece, side: Literal["before", "behind"], encoder: TextEncoder) -> bool:
    """Whether a control token takes in the blanks on one of its sides, as Phi-3's do the line end behind them."""
    return piece.kind == "control" and encoder.takes_blanks(piece.text, side)
