"""A conversation in the terminal: answers appear while they are written, earlier turns and images are remembered."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from integrations.llava.data import read_image
from integrations.llava.inference import Conversation, load_predictor
from layerfuse.errors import InputError, UserError

from .options import (
    CommandParser,
    add_model_options,
    add_sampling_options,
    loading_options,
    print_anything,
    quiet_bars,
    read_sampling,
)

__all__ = ["main", "print_answer"]

_HELP = """/image PATH   show an image with the next message; several times for several
/clear        forget the conversation and its images
/help         this list
/exit         leave; so does Ctrl-D. Ctrl-C stops an answer"""


def main(argv: Sequence[str] | None = None) -> int:
    """Chat until the input ends."""
    parser = CommandParser(
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
    quiet_bars()
    try:
        sampling = read_sampling(arguments)
        if sampling.num_beams > 1:
            raise InputError(f"--num-beams {sampling.num_beams}: beams cannot be streamed; leave it out.")
        opened = [read_image(path) for path in arguments.image]
        conversation = Conversation(load_predictor(arguments.model, **loading_options(arguments)), sampling)
    except UserError as error:
        parser.error(str(error))
    conversation.shown = opened
    print_anything()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text become an error like any other that a question meets, and the conversation goes on.
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
                print_answer(conversation, line)
        except UserError as error:
            print(error, flush=True)
        except KeyboardInterrupt:
            print(flush=True)


def print_answer(conversation: Conversation, text: str) -> None:
    """Print the answer to a message while it is written; Ctrl-C keeps the text written by then."""
    room = conversation.room(text)
    if room is not None and 0 < room < conversation.sampling.max_new_tokens:
        print(f"(room for {room} more tokens is left; /clear forgets what was said)", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt), closing(conversation.say(text)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
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
