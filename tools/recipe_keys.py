"""The page of every key of a recipe, made from the dataclasses that a recipe is read into.

python -m tools.recipe_keys        # writes docs/recipe_keys.md
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from integrations.llava.config import STAGES, Recipe, StageConfig

__all__ = ["PAGE", "render_page"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipe_keys.md"

_HEAD = """# Every key of a recipe

Made from the dataclasses that read a recipe (`python -m tools.recipe_keys`); a test holds it. A key is written in the
YAML file under its section, or on the command line with its section in front: `--finetune.learning_rate 2e-5`,
`--model.fuser average`, `--finetune.data.max_length 1024`. Keys that are absent have the default. What recipes are for,
and which there are: [recipes](recipes.md).
"""
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "none", Any: "any value"}


def main() -> None:
    """Write the page."""
    PAGE.write_text(render_page(), encoding="utf-8")


def render_page() -> str:
    """Return the page's text: a table for each section of a recipe."""
    defaults = Recipe()
    sections = [
        *_sections("", Recipe, (defaults,)),
        *_sections("model", type(defaults.model), (defaults.model,)),
        *_sections("pretrain, finetune", StageConfig, tuple(defaults.stage(name) for name in STAGES)),
    ]
    return "\n".join([_HEAD, *sections])


def _sections(path: str, config: Any, values: tuple[Any, ...]) -> Iterator[str]:
    """The section of a dataclass, and those of dataclasses within; `values` has the defaults of each stage."""
    told, kinds = _described(config), typing.get_type_hints(config, include_extras=True)
    inner, rows = [], []
    for field in dataclasses.fields(config):
        defaults = tuple(getattr(value, field.name) for value in values)
        if dataclasses.is_dataclass(defaults[0]):
            name = ", ".join(f"{part}.{field.name}" for part in path.split(", "))
            inner.append((name, type(defaults[0]), defaults))
        else:
            cells = (f"`{field.name}`", _kind(kinds[field.name]), _default(defaults), told[field.name])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    title = ", ".join(f"`{part}`" for part in path.split(", ")) if path else "The recipe itself"
    yield "\n".join([f"## {title}", "", "| key | values | default | what |", "|---|---|---|---|", *rows, ""])
    for name, kind, defaults in inner if path else ():
        yield from _sections(name, kind, defaults)


def _described(config: type) -> dict[str, str]:
    """What the docstring of a class says of each of its attributes."""
    listed = (inspect.getdoc(config) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _kind(kind: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, limit = _WORDS[parts[0]], kind.__metadata__[0]
        least = f"more than {limit.least:g}" if limit.above else f"at least {limit.least:g}"
        return f"{base}, {least}" if limit.most == float("inf") else f"{base}, {limit.least:g} to {limit.most:.10g}"
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in parts)
    if origin in (typing.Union, types.UnionType):
        return "; or ".join(_kind(part) for part in parts)
    if origin is tuple:
        return (
            f"list of {_kind(parts[0])}"
            if get_origin(parts[0]) in (None, Annotated)
            else f"list of ({_kind(parts[0])})"
        )
    if origin is dict:
        return "mapping" if parts[1] is Any else f"mapping to {_kind(parts[1])}"
    return _WORDS[kind]


def _default(values: tuple[Any, ...]) -> str:
    """The default, or that of each stage."""
    if all(value == values[0] for value in values):
        return _written(values[0])
    return "; ".join(f"{name}: {_written(value)}" for name, value in zip(STAGES, values, strict=True))


def _written(value: Any) -> str:
    """A value as YAML has it, in code marks."""
    if value in ("", (), {}):
        return "empty"
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    main()
