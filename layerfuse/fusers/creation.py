"""Fusers built by their name, or from the config that one was saved with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerfuse.argument_types import check_argument_types
from layerfuse.errors import InputError
from layerfuse.fusers.base import FUSERS, Fuser
from layerfuse.registry import unknown_name_message

__all__ = ["create_fuser", "fuser_class_for", "fuser_from_config", "list_fusers", "source_layers"]


def create_fuser(
    name: str,
    *,
    in_channels: int | Sequence[int],
    num_layers: int,
    options: Mapping[str, Any] | None = None,
) -> Fuser:
    """Build a fuser by its name in ``FUSERS``, freshly initialised.

    Args:
        name: as in `list_fusers`.
        in_channels: C of every map, or one number per map.
        num_layers: number of maps L.
        options: the fuser's own constructor arguments by name.

    Raises:
        ValueError: if the name or an option is unknown, an option without default is missing, or a value is not
            allowed.
    """
    given = {} if options is None else options
    build: Callable[..., Fuser] = fuser_class_for(name, given)
    return build(in_channels, num_layers, **given)


def fuser_class_for(name: str, options: Mapping[str, Any]) -> type[Fuser]:
    """Return the fuser of a name, whose constructor takes these options; nothing is built yet.

    Raises:
        ValueError: if the name or an option is unknown, an option without default is missing, or a value is of a type
            that is not taken.
    """
    fuser_class = FUSERS.get(name)
    if fuser_class.name != name:
        raise InputError(
            f"the entry point {name!r} leads to {fuser_class.__qualname__}, which is named {fuser_class.name!r}; "
            f"decorate the class with @FUSERS.register({name!r})."
        )
    if not isinstance(options, Mapping):  # read from a file, say
        raise InputError(f"the options of fuser {name!r} are {options!r}; give them by name, as a dict.")
    known = fuser_class.option_parameters()
    for option in options:
        if option not in known:
            raise InputError(unknown_name_message(f"option of fuser {name!r}", option, known))
    missing = [
        option for option, parameter in known.items() if parameter.default is parameter.empty and option not in options
    ]
    if missing:
        raise InputError(f"fuser {name!r} needs the options {', '.join(missing)}; give them in options.")
    check_argument_types(fuser_class.__init__, options, of=f"fuser {name!r}")
    return fuser_class


def fuser_from_config(config: Mapping[str, Any]) -> Fuser:
    """Build the fuser that a ``Fuser.config`` describes, freshly initialised.

    Raises:
        ValueError: if a key is missing or unknown.
    """
    missing = [key for key in ("name", "in_channels", "num_layers") if key not in config]
    if missing:
        raise InputError(
            f"the fuser config lacks {', '.join(missing)}; got the keys {', '.join(config) or 'none'}. A config holds "
            "name, in_channels, num_layers and the fuser's options."
        )
    options = {key: value for key, value in config.items() if key not in ("name", "in_channels", "num_layers")}
    return create_fuser(
        config["name"], in_channels=config["in_channels"], num_layers=config["num_layers"], options=options
    )


def list_fusers() -> list[str]:
    """List the names that `create_fuser` takes, sorted; those of other installed packages, too."""
    return list(FUSERS)


def source_layers(
    fuser: type[Fuser], num_blocks: int, options: Mapping[str, Any] | None = None
) -> tuple[int, ...] | None:
    """Return the layers that a fuser's source taps of a backbone, by `Fuser.default_layers`; None if it names none.

    Args:
        fuser: its class, as in ``FUSERS``.
        num_blocks: of the whole backbone.
        options: the fuser's own constructor arguments by name; those that decide which layers are tapped are used.
    """
    asked = inspect.signature(fuser.default_layers).parameters.values()
    given = dict(options or {})
    taken = {entry.name for entry in asked if entry.kind is entry.KEYWORD_ONLY} & given.keys()
    return fuser.default_layers(num_blocks, **{name: given[name] for name in taken})
