"""Cells of the model table: what came of a trial, in a word, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from layerfuse.errors import UserError

__all__ = ["ERROR", "NO", "YES", "DifferenceError", "Outcome", "TrialColumn", "attempt"]

YES, NO, ERROR = "yes", "no", "error"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ADDRESSES = re.compile(r" at 0x[0-9a-f]+|\d{5,}")
_LONGEST = 220


@dataclass(frozen=True)
class Outcome:
    """The outcome of one trial.

    Args:
        value: ``"yes"``; ``"no"`` for what is refused with a sentence; ``"error"`` for what failed or differed; or a
            number or word.
        note: why, of a no or an error.
    """

    value: str
    note: str = ""


class TrialColumn(NamedTuple):
    """What is tried of each row.

    Args:
        tried: takes the row's trial, and returns the cell's value, or raises.
        needs: names of the trial's attributes that it uses, which take time to build.
    """

    tried: Callable[[Any], str]
    needs: tuple[str, ...] = ()


class DifferenceError(Exception):
    """Two ways to the same numbers led to different ones."""


def attempt(trial: Callable[[], str]) -> Outcome:
    """Return what a trial came to; whatever it raises is written into the cell."""
    try:
        found = trial()
    except UserError as error:
        return Outcome(NO, _first_sentence(error))
    except Exception as error:  # a cell that fails says so, and the other cells are tried
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            return Outcome(NO, _first_sentence(cause))
        return Outcome(ERROR, f"{type(cause).__name__}: {_first_sentence(cause)}")
    return Outcome(found)


def _first_sentence(error: BaseException) -> str:
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    text = _ADDRESSES.sub("", lines[0] if lines else "")
    sentence = re.split(r"(?<=[a-z)\]'])[.;] ", text, maxsplit=1)[0]
    return sentence[:_LONGEST].rstrip(" .")
