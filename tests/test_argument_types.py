"""Values checked against type hints: what fits, what does not, and what the message says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import pytest
import torch

from layerfuse.argument_types import check_argument_types
from layerfuse.errors import InputError


def _takes(
    whole: int = 0,
    number: float = 0.0,
    flag: bool = False,
    text: str = "",
    maybe: int | None = None,
    edges: int | Sequence[int] = 1,
    listed: list[float] | None = None,
    pair: tuple[int, str] = (1, ""),
    many: tuple[int, ...] = (),
    old: Optional[Union[int, str]] = None,  # noqa: UP007, UP045
    table: Mapping[str, int] | None = None,
    anything: Any = None,
    bare=None,  # type: ignore[no-untyped-def]
) -> None:
    """With hints of many kinds."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("whole", 3), ("number", 3), ("number", 0.5), ("number", np.float64(0.5)), ("flag", True), ("text", "a")],
        *[("maybe", None), ("maybe", 3), ("edges", 2), ("edges", [2, 3]), ("edges", (2, 3)), ("edges", range(3))],
        *[("listed", [1, 2.5]), ("listed", None), ("pair", [1, "a"]), ("many", ()), ("many", [1, 2])],
        *[("old", 3), ("old", "a"), ("old", None), ("table", {"a": "b"}), ("anything", object()), ("bare", 3)],
        ("unhinted", 3),
    ],
)
def test_a_value_of_the_hints_type_passes(name: str, value: Any) -> None:
    check_argument_types(_takes, {name: value}, of="it")


WHOLE, NUMBER, LIST = "a whole number (int)", "a number (float)", "a list, of a whole number (int) each"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *[("whole", value, WHOLE) for value in ("3", 2.0, True, None, [3], np.int64(3), np.bool_(True))],
        ("whole", torch.tensor(3), WHOLE),
        *[("number", value, NUMBER) for value in ("1e-6", True, None, np.float32(1))],
        *[("flag", value, "True or False") for value in (1, "true", None, np.bool_(True))],
        *[("text", value, "a string") for value in (1, None, b"a", ["a"])],
        *[("maybe", value, f"{WHOLE} or None") for value in ("", 2.0, False)],
        *[("edges", value, f"{WHOLE} or {LIST}") for value in ("23", [2.0, 3], ["2"], [True], None, {2, 3})],
        ("edges", np.array([2, 3]), f"{WHOLE} or {LIST}"),
        ("listed", ["a"], "a list, of a number (float) each or None"),
        ("pair", [1, None], "a list, of a whole number (int) or a string each"),
        ("many", 3, LIST),
        ("old", 2.0, f"{WHOLE} or a string or None"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, allowed: str) -> None:
    shown = re.escape(f"{name} of it is {value!r}, of type {type(value).__name__}; give {allowed}.")
    with pytest.raises(InputError, match=f"^{shown}$"):
        check_argument_types(_takes, {name: value}, of="it")


def test_hints_that_cannot_be_read_check_nothing() -> None:
    def odd(whole: int, other: TypeOfNoFile) -> None:  # type: ignore[name-defined]  # noqa: F821
        """With a hint that only a type checker sees."""

    check_argument_types(odd, {"whole": "3"}, of="it")
