"""One registry for everything that is chosen by name: fusers, backbone families.

Names come from decorators inside layerfuse, and from Python entry points of other installed packages.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, Generic, TypeVar

from layerfuse.errors import InputError

__all__ = ["Registry", "unknown_name_message"]

T = TypeVar("T")


def unknown_name_message(kind: str, name: object, known: Iterable[str], *, of: str = "") -> str:
    """Return the message for a name that is not known: the nearest of the known names, if one is near, and their list.

    Args:
        kind: what the name stands for, such as ``"fuser"``.
        name: what was given, which need not be a string.
        known: the names that are taken.
        of: whose name it is, such as ``"fuser 'concat'"``, for a ``kind`` that many have.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    whose = f" of {of}" if of else ""
    return f"{kind} {name!r}{whose} is unknown{hint} Known: {', '.join(names) or 'none'}."


def _full_name(entry: Any) -> str:
    """Return a class's module and name; what makes objects without being a class, such as a partial, has none."""
    name = getattr(entry, "__qualname__", None)
    return repr(entry) if name is None else f"{entry.__module__}.{name}"


class Registry(Generic[T]):
    """A dictionary from names to classes, which other packages add to.

    Args:
        kind: what is registered, for messages, such as ``"fuser"``.
        group: entry point group in which other packages announce theirs, such as ``"layerfuse.fusers"``.
    """

    def __init__(self, kind: str, *, group: str) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, type[T]] = {}
        self._outside: dict[str, metadata.EntryPoint] | None = None

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that registers a class under the name that users write.

        Raises:
            ValueError: if the name is taken by another class.
        """

        def decorate(entry: type[T]) -> type[T]:
            # By their names: a notebook cell run twice defines the same class again; that is not a clash.
            ours, taken = (_full_name(each) for each in (entry, self._entries.get(name, entry)))
            if taken != ours:
                raise InputError(
                    f"{self.kind} {name!r} is already registered by {taken}; choose another name for {ours}."
                )
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> type[T]:
        """Return the class of a registered name, or of an entry point in ``group``, which is then loaded.

        Raises:
            ValueError: if nothing has that name; the message gives the nearest match and the full list.
        """
        if not isinstance(name, str):  # read from a file, say
            raise InputError(unknown_name_message(self.kind, name, self.names()))
        if name not in self._entries and name in self._entry_points():
            self._entries[name] = self._entry_points()[name].load()
        if name not in self._entries:
            raise InputError(unknown_name_message(self.kind, name, self.names()))
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return every known name, sorted."""
        return tuple(sorted({*self._entries, *self._entry_points()}))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        if self._outside is None:
            self._outside = {point.name: point for point in metadata.entry_points(group=self.group)}
        return self._outside
