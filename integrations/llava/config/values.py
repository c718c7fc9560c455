"""Values of a recipe, each brought to the type that its field declares, or refused by its key."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from layerfuse.errors import InputError

from .limits import listed_words
from .yaml_syntax import Word

__all__ = ["alternatives", "decode", "field_types", "is_mapping", "is_text"]

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


def field_types(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and type of every field of a dataclass and of the dataclasses in it."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        yield prefix + item.name, kind
        if dataclasses.is_dataclass(kind):
            yield from field_types(typing.cast(type, kind), f"{prefix}{item.name}.")


def is_text(kind: Any) -> bool:
    """Whether a field takes text as it stands, or None."""
    return kind is str or (_is_optional(kind) and str in get_args(kind))


def is_mapping(kind: Any) -> bool:
    """Whether a field takes a mapping with keys of the user's own."""
    return any(get_origin(each) is dict for each in (kind, *alternatives(kind)))


def decode(kind: Any, value: Any, key: str = "") -> Any:
    """Value of YAML in the type `kind`; a dataclass takes a mapping with a value for every one of its fields.

    Raises:
        ValueError: naming the dotted key, the value and what is allowed.
    """
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        prefix = f"{key}." if key else ""
        values = {name: decode(hints[name], entry, prefix + name) for name, entry in value.items()}
        try:
            return typing.cast(Callable[..., Any], kind)(**values)
        except InputError as error:
            raise InputError(f"{key}: {error}" if key else str(error)) from error
    if value is None and _is_optional(kind):
        return None
    if choices := alternatives(kind):
        words = listed_words(choices[1:])
        return (
            _word_or(choices[0], words, value, key)
            if words
            else decode(choices[_is_list_for(choices, value)], value, key)
        )
    if get_origin(kind) is Literal:
        if value not in get_args(kind) or isinstance(value, bool):
            raise InputError(f"{key} is {_shown(value)}; give one of: {', '.join(map(str, get_args(kind)))}.")
        return str(value)
    if get_origin(kind) is tuple:
        item, entries = get_args(kind)[0], value if isinstance(value, list | tuple) else [value]
        if get_origin(item) is tuple and (text := [entry for entry in entries if isinstance(entry, str)]):
            raise InputError(f"{key} is {_shown(text[0])}; give lists of numbers in a list, such as [[1, 2], [3, 4]].")
        return tuple(decode(item, entry, key) for entry in entries)
    if get_origin(kind) is dict:
        return _mapping(get_args(kind)[1], value, key)
    return _anything(value, key) if kind is Any else _READERS[kind](value, key)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Types of a field that may also be empty, or a list of one value for each of several; none for other fields."""
    is_union = get_origin(kind) in (typing.Union, types.UnionType)
    return tuple(each for each in get_args(kind) if each is not type(None)) if is_union else ()


def _word_or(kind: Any, words: Sequence[str], value: Any, key: str) -> Any:
    """One of some words, or a value of another type."""
    if value in words:
        return str(value)
    try:
        return decode(kind, value, key)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}, or {' or '.join(words)}.") from error


def _is_list_for(choices: Sequence[Any], value: Any) -> bool:
    """Whether a value is the list of several, the second choice, rather than one, the first."""
    listed = isinstance(value, list | tuple) and len(choices) > 1
    if listed and get_origin(choices[0]) is tuple:
        return any(isinstance(entry, list | tuple) for entry in value)
    return listed


def _mapping(kind: Any, value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{key} is {_shown(value)}; give keys with values: {key}: {{name: value}}.")
    for name in value:
        if not isinstance(name, str) or isinstance(name, Word):
            raise InputError(f"{key} has the key {name!r}, which is no text; put it in quotes.")
    return {name: decode(kind, entry, f"{key}.{name}") for name, entry in value.items()}


def _anything(value: Any, key: str) -> Any:
    if isinstance(value, Word):
        raise InputError(f"{key} is {value}, which may be text or a truth value; write true, false, or '{value}'.")
    if isinstance(value, Mapping):
        return _mapping(Any, value, key)
    return [_anything(entry, key) for entry in value] if isinstance(value, list | tuple) else value


def _read_text(value: Any, key: str) -> str:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, str):
        advice = "put it in quotes to make it text" if isinstance(value, int | float) else "give text"
        raise InputError(f"{key} is {_shown(value)}; {advice}.")
    return str(value)


def _read_bool(value: Any, key: str) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if isinstance(word, bool):
        return word
    if not isinstance(word, str) or word not in _TRUE + _FALSE:
        raise InputError(f"{key} is {_shown(value)}; give true or false.")
    return word in _TRUE


def _read_int(value: Any, key: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"[-+]?(0|[1-9][\d_]*)", value):
        return int(value)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise InputError(f"{key} is {_shown(value)}; give a whole number.")
    return int(value)


def _read_float(value: Any, key: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{key} is {_shown(value)}; give a finite number.")
    return number


_READERS: Mapping[Any, Callable[[Any, str], Any]] = {
    str: _read_text,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
}


def _shown(value: Any) -> str:
    """Value as a recipe has it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(str(value)) if isinstance(value, str) else repr(value)


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in (typing.Union, types.UnionType) and type(None) in get_args(kind)
