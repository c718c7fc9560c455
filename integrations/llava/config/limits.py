"""Limits that the types of a recipe's numbers declare, and the dataclass that keeps to them."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from layerfuse.errors import InputError

__all__ = ["Checked", "Count", "Natural", "Positive", "Rate", "Seed", "Share", "Within", "listed_words"]


@dataclass(frozen=True)
class Within:
    """Limits of a number; with `above`, `least` itself is not allowed."""

    least: float
    most: float = math.inf
    above: bool = False

    def check(self, name: str, value: float) -> None:
        """Refuse a number outside the limits, or none at all (NaN), with a ValueError that names what is allowed."""
        if not math.isfinite(value):
            raise InputError(f"{name}={value} is no finite number.")
        if value < self.least or (self.above and value == self.least):
            raise InputError(
                f"{name}={value} is too small; give {'more than' if self.above else 'at least'} {self.least:g}."
            )
        if value > self.most:
            raise InputError(f"{name}={value} is too large; give at most {self.most:.10g}.")


Count = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
# What numpy and torch both take.
Seed = Annotated[int, Within(0, 2**32 - 1)]
Rate = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
Share = Annotated[float, Within(0, 1)]


def listed_words(kinds: Iterable[Any]) -> list[str]:
    """Words that types list, those of `Literal`; other types list none."""
    return [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


class Checked:
    """A dataclass whose numbers lie within the limits that their types declare, and words among those they list."""

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            words = listed_words((kind, *get_args(kind)))
            # What is no text is held against the other types of a choice where a recipe is read.
            if words and value not in words and (get_origin(kind) is Literal or isinstance(value, str)):
                raise InputError(f"{name} is {value!r}; give one of: {', '.join(map(str, words))}.")
            # Limits may stand on an entry, as in `int | None` or `dict[str, float]`.
            limits = [m for part in (kind, *get_args(kind)) for m in getattr(part, "__metadata__", ())]
            named = {name: value}
            if isinstance(value, dict):
                named = {f"{name}.{key}": entry for key, entry in value.items()}
            elif isinstance(value, tuple):
                named = {f"{name}[{place}]": entry for place, entry in enumerate(value)}
            for limit in limits:
                for key, entry in named.items():
                    if entry is not None:
                        limit.check(key, entry)
