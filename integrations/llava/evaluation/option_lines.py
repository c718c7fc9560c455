"""Options with letters, as lines of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["lettered", "option_lines"]


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Give options their letters, A first."""
    return {chr(ord("A") + place): option for place, option in enumerate(options)}


def option_lines(options: Mapping[str, str], form: str = "{}. {}") -> str:
    """Write a line per option, letter and text, each behind a line's end."""
    return "".join(f"\n{form.format(letter, text)}" for letter, text in options.items())
