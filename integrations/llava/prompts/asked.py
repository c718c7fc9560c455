"""What is asked about an image, as the ids that a fuser with a condition reads (`text_gated`).

In training an image goes with all of the human's turns. In a chat it goes with those up to the turn that shows it: then
no later turn changes the image's tokens, and keys and values that were cached for them stay right.
"""

from __future__ import annotations

from collections.abc import Sequence

from .encoder import TextEncoder
from .templates import IMAGE_TAG, Message

__all__ = ["asked_ids"]


def asked_ids(
    messages: Sequence[Message],
    num_images: int,
    *,
    encoder: TextEncoder,
    until_shown: bool,
    at_most: int | None = None,
) -> list[list[int]]:
    """Tokenise the human's words, each turn by itself, without roles and image tags.

    Args:
        messages: turns in LLaVA's format; where no turn has a tag, the first of the human's shows all images.
        num_images: images that belong to the conversation.
        encoder: how they are tokenised.
        until_shown: whether an image goes with the turns up to the one that shows it, rather than with all.
        at_most: as many ids of each turn are enough; None gives all.

    Returns:
        The ids of each image.
    """
    turns = [message["value"] for message in messages if message["from"] == "human"]
    ids: list[int] = []
    shown: list[list[int]] = []
    for index, text in enumerate(turns):
        words = text.replace(IMAGE_TAG, "").strip()
        ids = ids + encoder(words, at_start=True, at_least=at_most)[:at_most]
        tagged = text.count(IMAGE_TAG) if any(IMAGE_TAG in turn for turn in turns) else num_images * (index == 0)
        # Several tags of one image in one turn are one, see `turns.split_at_images`.
        shown += [ids] * min(tagged, num_images - len(shown))
    return shown if until_shown else [ids] * num_images
