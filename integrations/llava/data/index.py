"""Where each sample of a data file stands: byte offsets, found once without holding the samples in memory."""

from __future__ import annotations

import codecs
import json
import mmap
import re
from pathlib import Path

import numpy as np

from layerfuse.errors import InputError

__all__ = ["array_spans", "has_lines", "line_spans"]

_PIECE = 16 * 2**20
_BLANK = np.frombuffer(b" \t\r\n\v\f", np.uint8)
_TEXT = re.compile(rb"[^ \t\r\n\v\f]")
_BLANKS = re.compile(r"[ \t\r\n]*")
_UNFINISHED = ("", ".", *(letter + sign for letter in "eE" for sign in ("", "+", "-")))
_DECODE = json.JSONDecoder().raw_decode


def has_lines(data: mmap.mmap, path: Path) -> bool:
    """Whether a file has one sample a line and not a list; its ending decides where the beginning is neither's.

    Raises:
        ValueError: if the samples are written over several lines each, without being a list.
    """
    start = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
    first = _TEXT.search(data, start)
    if first is None or first[0] not in (b"[", b"{"):
        return path.suffix == ".jsonl"
    end = data.find(b"\n", first.start())
    further = None if end < 0 else _TEXT.search(data, end)
    if first[0] == b"[":
        # Only a line that is a list by itself, with more lines below, is one bad line among others.
        return path.suffix == ".jsonl" and further is not None and _is_json(data[first.start() : end])
    if further is not None and data[first.start() : end].strip() == b"{":
        raise InputError(
            f"data file {path} has samples that are written over several lines, and is no list; write one sample a "
            "line, or all of them as one list, [{…}, …]."
        )
    return path.suffix == ".jsonl" or (further is not None and further[0] == b"{")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def line_spans(data: mmap.mmap, *, piece: int = _PIECE) -> np.ndarray:
    """The lines of a jsonl file that are not blank, looked for `piece` bytes at a time.

    Returns:
        (N, 3) int64: first byte, byte behind the last, number of the line from 1.
    """
    size = len(data)
    found = [
        np.flatnonzero(np.frombuffer(data[start : start + piece], np.uint8) == ord("\n")) + start
        for start in range(0, size, piece)
    ]
    ends = np.concatenate([*found, np.array([size])]).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    spans = np.stack([starts, ends, np.arange(1, len(ends) + 1)], axis=1)[starts < ends]
    # A line can only be blank if its first byte is; hardly any needs the slow look.
    first = np.frombuffer(data, np.uint8)[spans[:, 0]]
    blank = [row for row in np.flatnonzero(np.isin(first, _BLANK)) if data[slice(*spans[row, :2])].isspace()]
    return np.delete(spans, blank, axis=0)


def array_spans(data: mmap.mmap, path: Path, *, piece: int = _PIECE) -> np.ndarray:
    """The entries of a JSON list, read `piece` bytes at a time; an entry may be larger.

    Returns:
        (N, 3) int64: first byte, byte behind the last, number of the entry from 1.

    Raises:
        ValueError: if the file is no JSON list, with the place of the fault.
    """
    window = _Window(data, path, piece)
    if (opening := window.next("'['")) != "[":
        kind = "a dict" if opening == "{" else "no list"
        raise InputError(
            f"data file {path} holds {kind}; it has to be a list of samples, [{{…}}, …]. Give a file with one sample a "
            "line the ending .jsonl."
        )
    window.move(window.place + 1)
    rows: list[tuple[int, int, int]] = []
    character = window.next("an entry or ']'")
    while character != "]":
        window.entry = len(rows) + 1
        rows.append((*window.value(), window.entry))
        character = window.next("',' or ']'")
        if character == ",":
            window.move(window.place + 1)
            if (character := window.next("an entry")) == "]":
                raise window.fault("a comma before ']'")
        elif character != "]":
            raise window.fault("a missing ','")
    window.move(window.place + 1)
    if window.next(None):
        raise window.fault("more text behind the list")
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


class _Window:
    """The text of a part of the file, and a place in it that moves to the right."""

    def __init__(self, data: mmap.mmap, path: Path, piece: int) -> None:
        self.data, self.path, self.piece = data, path, piece
        self.text, self.place = "", 0
        self.read = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
        # Of `place` in the file; characters are not bytes.
        self.byte = self.read
        self.entry = 1
        self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def move(self, place: int) -> None:
        self.byte += len(self.text[self.place : place].encode())
        self.place = place

    def grow(self) -> bool:
        """Drop the text left of the place and read on; False at the end of the file."""
        self.text, self.place = self.text[self.place :], 0
        # Doubling: an entry of any size is whole after a few steps.
        piece = self.data[self.read : self.read + max(self.piece, len(self.text))]
        self.read += len(piece)
        try:
            self.text += self._decode(piece, final=self.read == len(self.data))
        except UnicodeDecodeError as error:
            raise self.fault(f"no UTF-8 ({error.reason})") from error
        return bool(piece)

    def next(self, wanted: str | None) -> str:
        """Move to the next character that is no blank; "" at the end of the file, if nothing is wanted."""
        while True:
            match = _BLANKS.match(self.text, self.place)
            assert match is not None
            self.move(match.end())
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.grow():
                if wanted is None:
                    return ""
                raise self.fault(f"the file ends, expected {wanted}")

    def value(self) -> tuple[int, int]:
        """Move behind the value that begins here, and return its span in bytes."""
        start = self.byte
        while True:
            try:
                length = _DECODE(self.text, self.place)[1] - self.place
            except json.JSONDecodeError as error:
                if not self.grow():
                    raise self.fault(error.msg) from error
                continue
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 100,000 brackets
                raise self.fault(str(error)) from error
            end = self.place + length
            # A number may go on behind the window's end: it touches it, or all but its fraction or exponent is there.
            if self.text[end : end + 3] not in _UNFINISHED or not self.grow():
                self.move(end)
                return start, self.byte

    def fault(self, what: str) -> InputError:
        """Word an error; the byte is where the entry at fault begins."""
        return InputError(f"data file {self.path} is not valid JSON: {what} (entry {self.entry}, byte {self.byte}).")
