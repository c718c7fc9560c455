"""A conversation in the terminal: answers appear while they are written, earlier turns and images are remembered."""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from PIL import Image

from integrations.llava.data import read_image
from integrations.llava.inference import Predictor, SamplingParams
from integrations.llava.prompts import IMAGE_TAG, Message
from layerfuse.errors import InputError, UserError

from .options import add_model_options, add_sampling_options, load_from_options, print_anything, read_sampling

__all__ = ["Conversation", "main"]

_HELP = """/image PATH   show an image with the next message; several times for several
/clear        forget the conversation and its images
/help         this list
/exit         leave; so does Ctrl-D. Ctrl-C stops an answer"""


class Conversation:
    """What was said and shown so far.

    Args:
        predictor: the model.
        sampling: how it answers; a turn that is sampled draws anew.

    Attributes:
        messages: turns in LLaVA's format.
        images: of all turns, in order.
        shown: images that go with the next message.
    """

    def __init__(self, predictor: Predictor, sampling: SamplingParams) -> None:
        self.predictor = predictor
        self.sampling = sampling
        self.messages: list[Message] = []
        self.images: list[Image.Image] = []
        self.shown: list[Image.Image] = []

    def show(self, path: str | Path) -> None:
        """Read an image for the next message.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it cannot be read.
        """
        self.shown.append(read_image(path))

    def clear(self) -> None:
        """Forget everything."""
        self.messages, self.images, self.shown = [], [], []

    def say(self, text: str) -> None:
        """Print the answer to a message while it is written, and remember both; Ctrl-C keeps what is there by then.

        Stopped before its first word, the message is forgotten, and its images still wait. An answer ends where the
        positions that the model reads do; if that is sooner than was asked for, it is said before.

        Raises:
            ValueError: if the model cannot be asked that; the message is forgotten likewise.
        """
        # As in training: a message's images stand in front of it, unless it says where.
        placed = len(self.shown) > 1 and text.count(IMAGE_TAG) == len(self.shown)
        value = text if placed else f"{IMAGE_TAG}\n" * len(self.shown) + text
        messages = [*self.messages, {"from": "human", "value": value}]
        images = [*self.images, *self.shown]
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + len(self.messages))
        room = self.predictor.prepare.room(messages, self.predictor.prepare.sizes(images))
        if room is not None and 0 < room < sampling.max_new_tokens:
            print(f"(room for {room} more tokens is left; /clear forgets what was said)", file=sys.stderr, flush=True)
            sampling = dataclasses.replace(sampling, max_new_tokens=room)
        answer, stopped = "", True
        with suppress(KeyboardInterrupt), closing(self.predictor.stream(images, messages, sampling=sampling)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                answer += piece
            stopped = False
        print(flush=True)
        if answer or not stopped:
            self.messages = [*messages, {"from": "gpt", "value": answer}]
            self.images, self.shown = images, []


def main(argv: Sequence[str] | None = None) -> int:
    """Chat until the input ends."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.llava chat",
        description="Talk with a trained model about images.",
        epilog=f"in the conversation:\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", nargs="+", default=[], help="images that go with the first message")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(max_new_tokens=512)
    arguments = parser.parse_args(argv)
    try:
        sampling = read_sampling(arguments)
        if sampling.num_beams > 1:
            raise InputError(f"--num-beams {sampling.num_beams}: beams cannot be streamed; leave it out.")
        opened = [read_image(path) for path in arguments.image]
        conversation = Conversation(load_from_options(arguments), sampling)
    except UserError as error:
        parser.error(str(error))
    conversation.shown = opened
    print_anything()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text are told as such, with what else a model cannot be asked, and the conversation goes on.
        sys.stdin.reconfigure(errors="surrogateescape")
    _talk(conversation)
    return 0


def _talk(conversation: Conversation) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives `input` a history and line editing)
        print(f"template {conversation.predictor.prepare.template.name!r}; /help lists the commands")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves")
            continue
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                print(_obey(conversation, line), flush=True)
            elif line:
                conversation.say(line)
        except UserError as error:
            print(error, flush=True)
        except KeyboardInterrupt:
            print(flush=True)


def _obey(conversation: Conversation, line: str) -> str:
    command, _, rest = line.partition(" ")
    if command == "/image" and rest:
        conversation.show(Path(rest.strip().strip("'\"")).expanduser())
        return f"images that go with the next message: {len(conversation.shown)}"
    if line == "/clear":
        conversation.clear()
        return "forgotten"
    return _HELP if line == "/help" else f"{line} is no command; there are:\n{_HELP}"
