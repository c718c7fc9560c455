"""A conversation about images: turns, the images shown so far, and the answer to the next message, piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from PIL import Image

from integrations.llava.data import read_image
from integrations.llava.prompts import IMAGE_TAG, Message

from .memory import ConversationMemory
from .predictor import Predictor
from .sampling import SamplingParams

__all__ = ["Conversation"]


class Conversation:
    """Turns and images, and a model that answers; a turn that is sampled draws anew.

    What the model read in earlier turns it reads again only where it has to; its images are encoded once.

    Attributes:
        messages: turns in LLaVA's format.
        images: of all turns, in order.
        shown: images that go with the next message.
    """

    def __init__(self, predictor: Predictor, sampling: SamplingParams) -> None:
        self.predictor = predictor
        self.sampling = sampling
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.messages: list[Message] = []
        self.images: list[Image.Image] = []
        self.shown: list[Image.Image] = []
        self._memory: ConversationMemory | None = None

    def show(self, path: str | Path) -> None:
        """Read an image file for the next message; errors are those of `read_image`."""
        self.shown.append(read_image(path))

    def room(self, text: str) -> int | None:
        """Count the tokens that are left to the answer to a message; None where the language model names no limit."""
        prepare = self.predictor.prepare
        return prepare.room(self._with(text), prepare.sizes([*self.images, *self.shown]))

    def say(self, text: str) -> Generator[str, None, None]:
        """Answer a message, and remember both once the iterator ends, is closed or interrupted (Ctrl-C).

        Stopped before its first word, the message is forgotten, and its images still wait. The answer ends where the
        positions that the model reads do, see `room`.

        Yields:
            Pieces of the answer.

        Raises:
            ValueError: if the model cannot be asked that; the message is forgotten likewise.
        """
        messages, images = self._with(text), [*self.images, *self.shown]
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + len(self.messages))
        room = self.room(text)
        if room is not None and 0 < room < sampling.max_new_tokens:
            sampling = dataclasses.replace(sampling, max_new_tokens=room)
        answer = ""
        self._memory = self._memory or self.predictor.new_memory()
        with closing(self.predictor.stream(images, messages, sampling=sampling, memory=self._memory)) as pieces:
            try:
                for piece in pieces:
                    answer += piece
                    yield piece
            except (GeneratorExit, KeyboardInterrupt):
                if not answer:
                    return
        self.messages = [*messages, {"from": "gpt", "value": answer}]
        self.images, self.shown = images, []

    def _with(self, text: str) -> list[Message]:
        # As in training: a message's images stand in front of it, unless it says where.
        placed = len(self.shown) > 1 and text.count(IMAGE_TAG) == len(self.shown)
        value = text if placed else f"{IMAGE_TAG}\n" * len(self.shown) + text
        return [*self.messages, {"from": "human", "value": value}]
