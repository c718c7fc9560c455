"""Pictures that a command was given: found, read batch after batch, and what becomes of those that cannot be read."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from layerfuse.backbones import AnyBackbone
from layerfuse.errors import InputError, MissingFileError
from layerfuse.features import FeatureMaps
from layerfuse.pictures import picture_names, read_picture

__all__: list[str] = []

# Seconds between two lines of progress where nobody watches.
_PATIENCE = 10.0
# Names in a line.
_SHOWN = 10

Report = Callable[[int, int], None]
Prepare = Callable[[Mapping[str, Image.Image]], torch.Tensor]


def say(text: str, end: str = "\n") -> None:
    """Tell whoever watches the command."""
    print(text, end=end, file=sys.stderr, flush=True)


class Progress:
    """One line that is written over on a terminal; elsewhere a line now and then. ``what`` is counted."""

    def __init__(self, what: str = "pictures") -> None:
        self._what = what
        self._started = self._shown = time.monotonic()
        self._before: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        terminal, last = sys.stderr.isatty(), done == total
        if self._before is None:
            self._before = done
        if not (terminal or last or now - self._shown >= _PATIENCE):
            return
        self._shown = now
        speed = (done - self._before) / (now - self._started)
        left = f", {(total - done) / speed:,.0f} s left" if speed and not last else ""
        say(
            f"{chr(13) * terminal}{done:,} of {total:,} {self._what}{left}   ", end="\n" if last or not terminal else ""
        )


class Batch(NamedTuple):
    """Some pictures, and what a backbone makes of them.

    Attributes:
        names: of the B pictures.
        images: (B, channels, height, width), as the backbone sees them, float32 on the CPU.
        features: L maps, each (B, N, C), float32 on the CPU.
    """

    names: tuple[str, ...]
    images: torch.Tensor
    features: FeatureMaps


class Pictures:
    """Picture files; those that turn out to be unreadable are left out, or end the command.

    Args:
        files: shown name -> file.
        arguments: with those of `add_reading_arguments`.

    Attributes:
        files: those of which nothing bad is known.
        left_out: name -> why, of those that could not be read.
    """

    def __init__(self, files: Mapping[str, Path], arguments: argparse.Namespace) -> None:
        self.files = dict(files)
        self.left_out: dict[str, str] = {}
        self._fail = arguments.bad_images == "fail"
        self._batch_size: int = arguments.batch_size
        if self._batch_size < 1:
            raise InputError(f"--batch-size is {self._batch_size}; give at least 1.")

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self, backbone: AnyBackbone, prepare: Prepare | None = None, report: Report | None = None
    ) -> Iterator[Batch]:
        """Give batch after batch, with progress; at the end it is said which pictures were left out.

        ``prepare`` makes the backbone's input of pictures by name, if not `Backbone.prepare`; ``report`` is told how
        many pictures are done, of how many, if not a `Progress`.

        Raises:
            ValueError: if a picture cannot be read and the command is to fail then, or if none can be read.
        """
        names, report = list(self.files), report or Progress()
        report(0, len(names))
        for start in range(0, len(names), self._batch_size):
            some = names[start : start + self._batch_size]
            pictures = {name: picture for name in some if (picture := self._read(name)) is not None}
            if pictures:
                with torch.inference_mode():
                    images = backbone.prepare(pictures.values()) if prepare is None else prepare(pictures)
                    features = backbone(images.to(backbone.device, backbone.dtype))
                yield Batch(tuple(pictures), images.to("cpu", torch.float32), features.to("cpu", torch.float32))
            report(start + len(some), len(names))
        tell_left_out({name: self.left_out[name] for name in names if name in self.left_out}, len(names))

    def _read(self, name: str) -> Image.Image | None:
        try:
            return read_picture(self.files[name])
        except InputError as error:
            if self._fail:
                raise
            self.left_out[name] = str(error)
            del self.files[name]
            return None


def add_reading_arguments(parser: argparse.ArgumentParser, batch_size: int = 8) -> None:
    """Add how pictures are read; each command that reads some has these."""
    add = parser.add_argument
    add(
        "--batch-size",
        type=int,
        default=batch_size,
        help=f"pictures that the model sees at a time (default: {batch_size})",
    )
    add(
        "--bad-images",
        choices=("skip", "fail"),
        default="skip",
        help="pictures that cannot be read are left out, and named (default), or end the command",
    )


def tell_left_out(left_out: Mapping[str, str], total: int) -> None:
    """Say which pictures of how many were left out, if any.

    Raises:
        ValueError: if none is left.
    """
    if not left_out:
        return
    if len(left_out) == total:
        raise InputError(f"none of {total} pictures can be read. The first: {next(iter(left_out.values()))}")
    say(f"{len(left_out)} of {total} pictures cannot be read and were left out: {some_names([*left_out])}")


def some_names(names: Sequence[str], count: int = _SHOWN) -> str:
    """Return the first names in a line, and that there are more if so."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def picture_files(given: Sequence[str]) -> dict[str, Path]:
    """Return the pictures that files and folders name: shown name -> file.

    Raises:
        FileNotFoundError: if one is neither a file nor a folder.
        ValueError: if a folder holds no picture.
    """
    files: dict[str, Path] = {}
    for text in given:
        place = Path(text)
        if place.is_dir():
            files.update({str(place / name): place / name for name in picture_names(place)})
        elif place.is_file():
            files[text] = place
        else:
            raise MissingFileError(
                f"{text} is neither a picture nor a folder; give files of pictures, or their folder."
            )
    return files
