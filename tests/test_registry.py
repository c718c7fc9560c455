"""The registry: names to classes, with helpful errors."""

from __future__ import annotations

import functools
import re
from importlib import metadata
from typing import Any

import pytest

from layerfuse.errors import InputError
from layerfuse.fusers import create_fuser
from layerfuse.registry import Registry, unknown_name_message


class Apple:
    """An entry."""


class Pear:
    """Another entry."""


def _registry() -> Registry[object]:
    registry: Registry[object] = Registry("fruit", group="layerfuse.test_fruit")
    registry.register("apple")(Apple)
    return registry


def test_registered_class_is_returned_unchanged() -> None:
    registry = _registry()
    assert registry.get("apple") is Apple
    assert "apple" in registry
    assert list(registry) == ["apple"]
    assert len(registry) == 1


def test_unknown_name_gets_nearest_match_and_the_list() -> None:
    with pytest.raises(ValueError, match="fruit 'aple' is unknown; did you mean 'apple'\\? Known: apple"):
        _registry().get("aple")


def test_name_without_near_match_gets_the_list_only() -> None:
    assert unknown_name_message("fruit", "xyz", ["b", "a"]) == "fruit 'xyz' is unknown. Known: a, b."
    assert unknown_name_message("fruit", "xyz", []) == "fruit 'xyz' is unknown. Known: none."


def test_the_message_says_whose_name_it_is() -> None:
    message = unknown_name_message("colour", "rde", ["red"], of="fruit 'apple'")
    assert message == "colour 'rde' of fruit 'apple' is unknown; did you mean 'red'? Known: red."


@pytest.mark.parametrize("name", [5, None, True, ["a"], {"a": 1}, b"a"], ids=repr)
def test_a_name_that_is_no_string_is_unknown(name: Any) -> None:
    assert unknown_name_message("fruit", name, ["a"]) == f"fruit {name!r} is unknown. Known: a."
    with pytest.raises(InputError, match=re.escape(f"fuser {name!r} is unknown. Known: attention_pool, ")):
        create_fuser(name, in_channels=8, num_layers=2)


def test_taken_name_is_refused_and_rerun_definition_is_not() -> None:
    registry = _registry()
    with pytest.raises(ValueError, match="fruit 'apple' is already registered by .*Apple; choose another name"):
        registry.register("apple")(Pear)
    again = type("Apple", (), {"__module__": Apple.__module__, "__qualname__": Apple.__qualname__})
    registry.register("apple")(again)
    assert registry.get("apple") is again


def test_a_partial_is_registered_and_a_rerun_definition_of_it_is_not_refused() -> None:
    registry = _registry()
    for _ in range(2):
        registry.register("green")(functools.partial(Pear, 1))  # type: ignore[arg-type]
    assert registry.get("green").func is Pear  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'green' is already registered by functools.partial\(.*Pear'>, 1\); .* for "):
        registry.register("green")(functools.partial(Pear, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"choose another name for .*\.Apple"):
        registry.register("green")(Apple)


def test_entry_point_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint(name="pear", value=f"{__name__}:Pear", group="layerfuse.test_fruit")
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [point])
    registry = _registry()
    assert registry.names() == ("apple", "pear")
    assert registry.get("pear").__name__ == "Pear"
