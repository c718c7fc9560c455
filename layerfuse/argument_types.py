"""Values checked against the type hints of the arguments that they are for.

What a file or a command line gives is seldom what a constructor was written for: ``"8"``, ``8.0``, ``true``. Without a
check it fails far away, in a forward pass, or not at all.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from layerfuse.errors import InputError

__all__ = ["check_argument_types"]

_IN_WORDS: Mapping[Any, str] = {
    int: "a whole number (int)",
    float: "a number (float)",
    bool: "True or False",
    str: "a string",
    type(None): "None",
}
_SEQUENCES = (Sequence, list, tuple)


def check_argument_types(function: Callable[..., Any], values: Mapping[str, Any], *, of: str) -> None:
    """Refuse values whose types are not what a function's hints say.

    Checked are ``int``, ``float``, ``bool``, ``str``, ``None``, unions, and sequences of these, for which lists and
    tuples do alike, as JSON has it; anything else passes. As in the configs of transformers, a bool is no int, a whole
    number is a float, and numpy's integers, which JSON cannot hold, are no int.

    Args:
        function: a function or a constructor. Hints that cannot be read, of names that its file does not have, check
            nothing.
        values: by the names of the arguments.
        of: whose arguments they are, such as ``"fuser 'concat'"``.

    Raises:
        ValueError: if a value is of another type.
    """
    hints = _hints(function)
    for name, value in values.items():
        hint = hints.get(name, Any)
        if not _fits(value, hint):
            allowed = " or ".join(dict.fromkeys(_described(hint)))
            raise InputError(f"{name} of {of} is {value!r}, of type {type(value).__name__}; give {allowed}.")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, AttributeError, TypeError):  # names imported for type checkers only, or a user's mistake
        return {}


def _fits(value: Any, hint: Any) -> bool:
    if options := _alternatives(hint):
        return any(_fits(value, option) for option in options)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if get_origin(hint) in _SEQUENCES:
        item = _item(hint)
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(each, item) for each in value)
    return True


def _described(hint: Any) -> Iterator[str]:
    if options := _alternatives(hint):
        for option in options:
            yield from _described(option)
    elif get_origin(hint) in _SEQUENCES:
        yield f"a list, of {' or '.join(dict.fromkeys(_described(_item(hint))))} each"
    else:
        yield _IN_WORDS.get(hint, str(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; none for anything else."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()


def _item(hint: Any) -> Any:
    """Return the hint of a sequence's items, a union where a tuple has several."""
    items = tuple(item for item in get_args(hint) if item is not Ellipsis)
    return Union[items] if items else Any  # noqa: UP007  # a union of types that are known at run time
