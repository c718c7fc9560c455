"""Recipe files: YAML in `recipes/` (or anywhere) read into a `Recipe`, and written back.

Values given on the command line or in code win over the file, a variant's over those of its base. Sections and
dictionaries are merged key by key; an empty dictionary clears the one below. Options belong to what they were written
for: another fuser does not inherit `fuser_options`, another backbone no `backbone_options`, another language model no
`llm_architecture`. With a checkpoint to go on from (`model.checkpoint`), a file that was written for a model of parts
gives its settings of stages only. Paths that begin with `./` or `../` are meant from the recipe file's own folder; all
others as the process sees them.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from layerfuse.errors import InputError, MissingFileError
from layerfuse.registry import unknown_name_message

from .model import OF_CHECKPOINT
from .schema import AS_MODEL, STAGES, ModelConfig, Recipe
from .values import alternatives, decode, field_types, is_mapping, is_text
from .yaml_syntax import dump_yaml, parse_yaml, read_yaml

__all__ = ["dump_recipe", "load_recipe", "parse_overrides", "recipe_names"]

_log = logging.getLogger(__name__)

RECIPE_FOLDER = Path(__file__).parents[1] / "recipes"

# Options of the model -> the values that they were written for.
_BELONG_TO = {
    "fuser_options": ("fuser",),
    "backbone_options": ("family", "backbone"),
    "llm_architecture": ("llm",),
    "checkpoint_digest": ("checkpoint",),
}


# Settings of each stage where a run goes on from a model.
_OWN = {"template": AS_MODEL, "data": {"image_mode": AS_MODEL}}


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    return tuple(sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml")))


def load_recipe(recipe: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, every value typed and every default filled in.

    Args:
        recipe: name of a recipe of this package, or path of a YAML file; None for the defaults alone.
        overrides: dotted key -> value, such as {"finetune.learning_rate": 1e-5}; they win over the file.
            {"model.checkpoint": folder} goes on from a model: of a file for another one, the settings of its stages
            count, but neither its model nor its templates and image modes, which are the checkpoint's own.

    Raises:
        ValueError: if the recipe, a key or a value is not allowed; keys are suggested.
        FileNotFoundError: if the file does not exist.
    """
    path = None if recipe is None else _find(recipe)
    values = {} if path is None else {"name": path.stem} | _read(path)
    defaults: dict[str, Any] = dataclasses.asdict(Recipe())
    start = (overrides or {}).get("model.checkpoint") or _checkpoint(values)
    if start:
        _refuse_parts(overrides or {})
        values = values if _checkpoint(values) == start else _settings_of_stages(values)
        defaults = _nest(defaults, dict.fromkeys(STAGES, _OWN), Recipe)
    merged = _merge(defaults, values)
    options = tuple(f"model.{name}" for name in _BELONG_TO)
    # What options belong to comes before them, wherever it stands on the command line.
    for key, value in sorted((overrides or {}).items(), key=lambda item: item[0].startswith(options)):
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _check_keys(nested, f"override {key!r}")
        merged = _merge(merged, nested)
    try:
        return decode(Recipe, merged)  # type: ignore[no-any-return]
    except InputError as error:
        raise error if path is None else InputError(f"{path}: {error}") from error


def _checkpoint(values: Mapping[str, Any]) -> Any:
    return values.get("model", {}).get("checkpoint")


def _settings_of_stages(values: Mapping[str, Any]) -> dict[str, Any]:
    """What counts of a recipe of parts for another model."""
    kept = {key: value for key, value in values.items() if key != "model"}
    for stage in STAGES & kept.keys():
        kept[stage] = {key: value for key, value in kept[stage].items() if key != "template"}
        if "data" in kept[stage]:
            kept[stage]["data"] = {key: value for key, value in kept[stage]["data"].items() if key != "image_mode"}
    return kept


def _refuse_parts(overrides: Mapping[str, Any]) -> None:
    allowed = {f"model.{name}" for name in (*OF_CHECKPOINT, "attention")}
    if other := sorted(key for key in overrides if key.startswith("model.") and key not in allowed):
        raise InputError(
            f"the run goes on from a model, which is taken as it is, and {', '.join(other)} would change it; leave "
            "that out, or leave out the model (--from, model.checkpoint)."
        )


def _read(path: Path, variants: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a file, and below it the one it derives from (`base: other.yaml`), and so on."""
    if path.resolve() in variants:
        names = " -> ".join(file.name for file in (*variants, path))
        raise InputError(f"{path} derives from itself ({names}); remove one `base`.")
    values = read_yaml(path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; a recipe is a mapping of keys to values.")
    _check_keys({key: value for key, value in values.items() if key != "base"}, str(path))
    base = values.pop("base", None)
    values = _anchor(values, path.parent)
    if base is None:
        return values
    if not isinstance(base, str):
        raise InputError(f"{path}: base is {base!r}; give the file or the name of a recipe.")
    file = path.parent / base
    if not file.is_file():
        if base not in recipe_names():
            raise MissingFileError(
                f"{path} derives from {file}, which does not exist; recipes of the package: "
                f"{', '.join(recipe_names())}."
            )
        file = RECIPE_FOLDER / f"{base}.yaml"
    below = _read(file, (*variants, path.resolve()))
    # The name is the file's own: a variant that took it over would train into its base's folder.
    below.pop("name", None)
    return _merge(_settings_of_stages(below) if _checkpoint(values) and not _checkpoint(below) else below, values)


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


def _check_keys(values: Mapping[str, Any], origin: str) -> None:
    known = dict(field_types(Recipe))
    for key, value in _keys(values, known):
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" did you mean {nearest[0]!r}?" if nearest else ""
            section = key.rpartition(".")[0]
            siblings = [name for name in known if name.rpartition(".")[0] == section] or list(known)
            raise InputError(f"{origin}: unknown key {key!r};{hint} Known here: {', '.join(siblings)}.")
        if dataclasses.is_dataclass(known[key]) and not isinstance(value, Mapping):
            raise InputError(f"{origin}: {key!r} is a section with keys of its own; it cannot be {value!r}.")


def _keys(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping) and dataclasses.is_dataclass(known.get(f"{prefix}{name}")):
            yield from _keys(value, known, f"{prefix}{name}.")


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay values over others: a variant's over its base's, the command line's over the file's."""
    kept, changed = dict(below.get("model", {})), above.get("model", {})
    model = dataclasses.asdict(ModelConfig()) | kept
    for options, owners in _BELONG_TO.items():
        news = [name for name in owners if name in changed and changed[name] != model[name]]
        if model[options] and news:
            _log.info(
                "%s %s was written for %s %r; it is left out for %r",
                f"model.{options}",
                model[options],
                news[0],
                model[news[0]],
                changed[news[0]],
            )
            kept[options] = "" if isinstance(model[options], str) else {}
    return _nest({**below, "model": kept} if kept else below, above, Recipe)


def _nest(below: Mapping[str, Any], above: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Merge key by key; where the recipe has a dictionary, an empty one or None clears what is below."""
    hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    merged = dict(below)
    for key, value in above.items():
        old, own = merged.get(key), hints.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and (value or dataclasses.is_dataclass(own)):
            merged[key] = _nest(old, value, own)
        else:
            merged[key] = {} if value is None and is_mapping(own) else value
    return merged


def _anchor(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return {key: _anchor(entry, folder) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_anchor(entry, folder) for entry in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((folder / value).resolve())
    return value


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value of `--section.key value` arguments; a switch needs no value, a list several or commas.

    A value stays as it is where the recipe has text; elsewhere it is read as YAML.

    Raises:
        ValueError: if an argument stands where a `--key` is expected, or a key has no value that is no switch.
    """
    known = dict(field_types(Recipe))
    words: dict[str, list[str]] = {}
    key: str | None = None
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            key = name[2:].replace("-", "_")
            words[key] = [value] if equals else []
        elif key is None:
            raise InputError(f"{argument!r} is not a key; overrides look like --finetune.learning_rate 2e-5.")
        else:
            words[key].append(argument)
    return {key: _read_words(key, values, known.get(key, Any)) for key, values in words.items()}


def _read_words(key: str, words: Sequence[str], kind: Any) -> Any:
    if not words:
        if kind not in (bool, Any) and bool not in alternatives(kind):
            raise InputError(f"--{key} has no value; write it behind: --{key} VALUE.")
        return True
    choices, in_brackets = alternatives(kind), words[0].startswith("[")
    empty = type(None) in get_args(kind) and [*words] in (["null"], ["~"])
    if len(choices) > 1:
        kind = Any if in_brackets else choices[0]
    elif choices:
        kind = choices[0] if get_origin(choices[0]) is tuple else kind
    if get_origin(kind) is tuple and not in_brackets and not empty:
        entries = [part for word in words for part in word.split(",") if part.strip()]
        return [_read_word(key, part.strip(), get_args(kind)[0]) for part in entries]
    values = [_read_word(key, word, kind) for word in words]
    return values[0] if len(values) == 1 else values


def _read_word(key: str, word: str, kind: Any) -> Any:
    if is_text(kind):
        return None if kind is not str and word in ("null", "~") else word
    return parse_yaml(word, f"--{key} {word}")


def dump_recipe(recipe: Recipe) -> str:
    """YAML of a recipe with every value spelled out; `load_recipe` reads it back as the same recipe, from any folder.

    Of the model there are those that count: its parts, or the checkpoint that it goes on from. Paths that begin with
    `./` or `../` are meant from the working folder, and are written whole: in a file they would be its own folder's.
    """
    values = dataclasses.asdict(recipe)
    of_checkpoint = {*OF_CHECKPOINT, "attention"}
    if recipe.model.checkpoint:
        values["model"] = {key: value for key, value in values["model"].items() if key in of_checkpoint and value}
    else:
        values["model"] = {key: value for key, value in values["model"].items() if key not in OF_CHECKPOINT}
    return dump_yaml(_anchor(values, Path()))
