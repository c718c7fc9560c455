"""Options of wrong types and values: refused where a fuser is built, whoever builds it, in the same words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from layerfuse import create_encoder
from layerfuse.errors import InputError
from layerfuse.fusers import FUSERS, CrossAttention, DenseConnector, MMFuser, create_fuser, fuser_from_config
from layerfuse.fusers.base import Fuser

NEEDED = {"text_gated": {"condition_channels": 6}}
# Of each hint: values that are not what it says.
WRONG: dict[str, tuple[Any, ...]] = {
    "int": ("2", 2.0, True, None, [2], np.int64(2)),
    "float": ("1e-6", True, None),
    "str": (2, None, True, ["a"]),
    "bool | None": (1, "yes", 0.0),
    "str | None": (2, True),
    "int | None": ("2", 2.0, False),
    "int | Sequence[int]": ("2", 2.0, True, None, ["2"], [True], [2.0]),
    "Sequence[int] | None": (2, "23", [2.0, 2], [True, 2]),
}


def _wrong_options() -> Iterator[Any]:
    for name, fuser_class in FUSERS._entries.items():
        if not fuser_class.__module__.startswith("layerfuse."):
            continue
        for option, parameter in fuser_class.option_parameters().items():
            for value in WRONG[parameter.annotation]:
                yield pytest.param(name, option, value, id=f"{name}-{option}-{value!r}")


def test_there_are_options_to_check() -> None:
    assert len(list(_wrong_options())) > 150


@pytest.mark.parametrize(("name", "option", "value"), _wrong_options())
def test_an_option_of_a_wrong_type_is_refused(name: str, option: str, value: Any) -> None:
    options = {**NEEDED.get(name, {}), option: value}
    message = rf"^{option} of fuser '{name}' is {re.escape(repr(value))}, of type {type(value).__name__}; give "
    with pytest.raises(InputError, match=message):
        create_fuser(name, in_channels=16, num_layers=4, options=options)
    with pytest.raises(InputError, match=message):
        FUSERS.get(name)(16, 4, **options)
    with pytest.raises(InputError, match=message):
        fuser_from_config({"name": name, "in_channels": 16, "num_layers": 4, **options})
    # Said before a backbone is fetched.
    with pytest.raises(InputError, match=message):
        create_encoder("timm:no_such_model", fuser=name, fuser_options=options)


@pytest.mark.parametrize("name", [name for name in FUSERS if not name.startswith("test")])
def test_widths_and_count_of_a_wrong_type_are_refused(name: str) -> None:
    options = NEEDED.get(name)
    for count in ("4", 4.0, True, None, np.int64(4)):
        with pytest.raises(InputError, match=rf"^num_layers of fuser '{name}' is .*; give a whole number \(int\)"):
            create_fuser(name, in_channels=16, num_layers=count, options=options)  # type: ignore[arg-type]
    for widths in ("16", 16.0, True, None, ["16"] * 4, [16.0] * 4):
        with pytest.raises(InputError, match=rf"^in_channels of fuser '{name}' is .* or a list, of a whole number"):
            create_fuser(name, in_channels=widths, num_layers=4, options=options)  # type: ignore[arg-type]


def test_every_hint_of_an_option_can_be_read() -> None:
    """An unreadable hint would check nothing."""
    for fuser_class in FUSERS._entries.values():
        inspect.get_annotations(fuser_class.__init__, eval_str=True)


@pytest.mark.parametrize("eps", [0, -1, -1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["concat", "cross_attention", "mmfuser"])
def test_an_epsilon_that_gives_no_numbers_is_refused(name: str, eps: float) -> None:
    with pytest.raises(InputError, match=f"norm_eps of fuser '{name}' is {eps}; give a finite number above 0"):
        create_fuser(name, in_channels=16, num_layers=2, options={"norm_eps": eps})
    assert create_fuser(name, in_channels=16, num_layers=2, options={"norm_eps": 1}).config["norm_eps"] == 1


def test_options_that_are_no_mapping_are_refused() -> None:
    for options in (["mode"], "mode", 3, []):
        with pytest.raises(InputError, match=r"^the options of fuser 'concat' are .*; give them by name, as a dict"):
            create_fuser("concat", in_channels=8, num_layers=2, options=options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="option of fuser 'concat' 3 is unknown. Known: grid, norm, "):
        create_fuser("concat", in_channels=8, num_layers=2, options={3: "layer"})  # type: ignore[dict-item]


class Hinted(Fuser):
    """Of a user, who says less of the shared arguments than they take."""

    def __init__(self, in_channels: int, num_layers: int, *, rank: int = 1) -> None:
        super().__init__(in_channels, num_layers)

    def fuse(self, features: Any, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        return features.maps[0]


class HintedChild(Hinted):
    """Without a constructor of its own."""


class Passing(Hinted):
    """With a constructor that passes another value up than it is given."""

    def __init__(self, in_channels: int | Sequence[int], num_layers: int, *, rank: str) -> None:
        super().__init__(in_channels, num_layers, rank=int(rank))  # type: ignore[arg-type]


def test_a_users_fuser_is_checked_by_its_own_hints() -> None:
    for fuser_class in (Hinted, HintedChild):
        assert fuser_class([8, 8], 2, rank=3).options == {"rank": 3}  # type: ignore[arg-type]
        with pytest.raises(
            InputError, match=f"rank of fuser '{fuser_class.__name__}' is '3', of type str; give a whole"
        ):
            fuser_class(8, 2, rank="3")  # type: ignore[arg-type]
    assert Passing(8, 2, rank="3").options == {"rank": "3"}


def test_an_unknown_mode_is_said_before_the_layers_that_it_would_choose() -> None:
    message = "mode 'foo' of fuser 'dense_connector' is unknown. Known: dci, sci, sti"
    with pytest.raises(InputError, match=message):
        create_encoder(
            "timm:vit_tiny_patch16_224", pretrained=False, fuser="dense_connector", fuser_options={"mode": "foo"}
        )
    with pytest.raises(InputError, match=message):
        DenseConnector.default_layers(12, mode="foo")
    with pytest.raises(InputError, match="option of fuser 'mmfuser' 'num_head' is unknown; did you mean 'num_heads'"):
        create_encoder("timm:no_such_model", fuser="mmfuser", fuser_options={"num_head": 8})


def test_names_that_are_near_are_hinted_at_by_every_fuser() -> None:
    for name, option, given, near in (
        ("concat", "norm", "layers", "layer"),
        ("concat", "resize", "bilinar", "bilinear"),
        ("depth_attention", "logits", "querry", "query"),
        ("scalar_mix", "start", "query_layers", "query_layer"),
        ("spatial_aggregator", "mixing", "separat", "separate"),
        ("dense_connector", "mode", "dc", "dci"),
        ("text_gated", "keys", "cls", "class"),
    ):
        message = rf"^{option} '{given}' of fuser '{name}' is unknown; did you mean '{near}'\? Known: "
        with pytest.raises(InputError, match=message):
            create_fuser(name, in_channels=8, num_layers=4, options={**NEEDED.get(name, {}), option: given})
    with pytest.raises(
        InputError, match=r"implementation 'gathr' of deformable attention is unknown; did you mean 'ga"
    ):
        MMFuser(16, 2, implementation="gathr")


def test_a_constructor_says_what_python_says_of_arguments_that_it_does_not_have() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_head'"):
        CrossAttention(16, 2, num_head=8)  # type: ignore[call-arg]
