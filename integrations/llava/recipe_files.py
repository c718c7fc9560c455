"""Recipe files: YAML in `recipes/` (or anywhere) read into a `Recipe`, and written back.

Values given on the command line or in code win over the file. An unknown key is an error that names the nearest right
one. Paths that begin with `./` or `../` are meant from the recipe file's own folder; all others as the process sees
them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml

from layerfuse.errors import InputError, MissingFileError
from layerfuse.registry import unknown_name_message

from .config import Recipe

__all__ = ["dump_recipe", "load_recipe", "parse_overrides", "recipe_names"]

RECIPE_FOLDER = Path(__file__).parent / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-5` as text; here it is a number."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    return tuple(sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml")))


def load_recipe(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        recipe: name of a recipe of this package, or path of a YAML file.
        overrides: dotted key -> value, such as {"finetune.learning_rate": 1e-5}; they win over the file.

    Returns:
        The recipe, every value typed and every default filled in.

    Raises:
        ValueError: if the recipe, a key or a value is not allowed; keys are suggested.
        FileNotFoundError: if the file does not exist.
    """
    path = _find(recipe)
    values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; a recipe is a mapping of keys to values.")
    values = _anchor(_with_base(values, path), path.parent)
    return _decode({"name": path.stem} | values, overrides or {}, origin=str(path))


def _with_base(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Resolve `base: other.yaml`: a variant shows only what differs."""
    base = values.pop("base", None)
    if base is None:
        return values
    base_path = path.parent / base
    if not base_path.is_file():
        raise MissingFileError(f"{path} derives from {base_path}, which does not exist.")
    inherited = yaml.load(base_path.read_text(encoding="utf-8"), Loader=_Loader)
    return _merge(_anchor(_with_base(inherited, base_path), base_path.parent), values)


def _find(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise MissingFileError(f"recipe file {path} does not exist.")
        return path
    if str(recipe) not in recipe_names():
        message = unknown_name_message("recipe", str(recipe), recipe_names())
        raise InputError(f"{message} A file of your own ends in .yaml.")
    return RECIPE_FOLDER / f"{recipe}.yaml"


def _decode(values: Mapping[str, Any], overrides: Mapping[str, Any], *, origin: str) -> Recipe:
    merged = _merge(_plain(draccus.encode(Recipe())), values)
    for key, value in overrides.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merged = _merge(merged, nested)
    _check_keys(merged, origin)
    try:
        return draccus.decode(Recipe, merged)
    except draccus.utils.DecodingError as error:
        raise InputError(f"{origin}: {error}") from error
    except draccus.utils.ParsingError as error:
        # A value refused by a class of ours arrives wrapped; its own message is the one that helps.
        raise InputError(f"{origin}: {error.__cause__ or error}") from error


def _check_keys(values: Mapping[str, Any], origin: str) -> None:
    known = dict(_fields(Recipe))
    for key, kind in known.items():
        section = _lookup(values, key) if dataclasses.is_dataclass(kind) else {}
        if not isinstance(section, Mapping):
            raise InputError(f"{origin}: {key!r} is a section with keys of its own; it cannot be {section!r}.")
    for key in _keys(values, known):
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" did you mean {nearest[0]!r}?" if nearest else ""
            section = key.rpartition(".")[0]
            siblings = [name for name in known if name.rpartition(".")[0] == section] or list(known)
            raise InputError(f"{origin}: unknown key {key!r};{hint} Known here: {', '.join(siblings)}.")


def _lookup(values: Mapping[str, Any], key: str) -> Any:
    value: Any = values
    for part in key.split("."):
        value = value.get(part, {}) if isinstance(value, Mapping) else {}
    return value


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        yield prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _fields(hints[item.name], f"{prefix}{item.name}.")


def _keys(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping) and dataclasses.is_dataclass(known.get(f"{prefix}{name}")):
            yield from _keys(value, known, f"{prefix}{name}.")


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _anchor(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return {key: _anchor(entry, folder) for key, entry in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((folder / value).resolve())
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `--section.key value` pairs; several values, or none for a switch, are allowed.

    Args:
        arguments: what stands on the command line behind the command's own options.

    Returns:
        Dotted key -> value, values read as YAML.

    Raises:
        ValueError: if an argument stands where a `--key` is expected.
    """
    overrides: dict[str, Any] = {}
    key: str | None = None
    values: list[str] = []

    def store() -> None:
        if key is not None:
            read = [yaml.load(value, Loader=_Loader) for value in values]
            overrides[key] = True if not read else read[0] if len(read) == 1 else read

    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            store()
            key, values = name[2:].replace("-", "_"), [value] if equals else []
        elif key is None:
            raise InputError(f"{argument!r} is not a key; overrides look like --finetune.learning_rate 2e-5.")
        else:
            values.append(argument)
    store()
    return overrides


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every value spelled out; `load_recipe` reads it back as the same recipe."""
    return yaml.safe_dump(_plain(draccus.encode(recipe)), sort_keys=False, allow_unicode=True)
