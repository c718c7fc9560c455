"""YAML as recipes have it: version 1.2's plain values, each key once, in any encoding that YAML allows.

YAML 1.1, which PyYAML reads, takes `2e-5` for text, `12:30` for 750, `010` for 8, a date for an object and `no` for
false. Here the first is a number and the others are text. The words for yes and no are a `Word`: whoever knows what is
expected there decides.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from layerfuse.errors import FileAccessError, InputError

__all__ = ["Word", "dump_yaml", "parse_yaml", "read_yaml"]

_INTEGER = r"[-+]?(?:0|[1-9][\d_]*)|0x[\da-fA-F]+|0o[0-7]+|0b[01]+"
_FLOAT = (
    r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+|[-+]?(?:\d[\d_]*\.\d*|\.\d+)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# Tag, what a plain value with it looks like, and its first letters.
_PLAIN = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("!word", r"(?i:yes|no|on|off)", "yYnNoO"),
    ("tag:yaml.org,2002:int", _INTEGER, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+0123456789."),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)


class Word(str):
    """Yes, no, on or off, written without quotes: text or a truth value."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice; keep one", key.start_mark
                )
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Read a node with all that it holds, so that an anchor within itself is an error."""
        return super().construct_object(node, deep=True)  # type: ignore[no-untyped-call]

    def construct_word(self, node: yaml.ScalarNode) -> Word:
        """Read one of the words for yes and no."""
        return Word(node.value)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version of YAML would not read as text."""


_Loader.add_constructor("!word", _Loader.construct_word)
for _tag, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Mappings, lists, text, numbers, truth values, `Word` and None from UTF-8, or bytes that mark their encoding.

    Raises:
        ValueError: if it is no YAML, a key stands twice, or its encoding is another one.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        raise InputError(f"{where} is no text in UTF-8 ({error.reason}); save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise InputError(f"{where}{place}: no valid YAML: {problem}.") from error
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply to be read.") from error


def read_yaml(path: Path) -> Any:
    """Content of a YAML file; errors as `parse_yaml`, and OSError if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileAccessError(f"{path} cannot be read ({error.strerror}).") from error
    return parse_yaml(content, str(path))


def dump_yaml(values: Any) -> str:
    """YAML of mappings, lists and plain values that `parse_yaml` reads back as they are."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
