"""Building fusers by name and by config, a user's own fuser, and every message on the way."""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch

import layerfuse.fusers
from layerfuse.features import FeatureMaps
from layerfuse.fusers import FUSERS, Fuser, Select, create_fuser, fuser_from_config
from layerfuse.taps import resolve_layers
from layerfuse.testing import random_features


class Unnamed(Fuser):
    """Complete, but not registered."""

    def __init__(self, in_channels: int | Sequence[int], num_layers: int) -> None:
        super().__init__(in_channels, num_layers)

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        return features.maps[0]


def test_every_fuser_file_has_its_import_line() -> None:
    folder = Path(layerfuse.fusers.__file__).parent
    lines = {
        node.module
        for node in ast.parse((folder / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module
    }
    files = [path for path in folder.glob("*.py") if path.stem != "__init__"]
    assert len(files) >= 6
    for path in files:
        assert f"layerfuse.fusers.{path.stem}" in lines, f"{path.name} lacks its import line in fusers/__init__.py"


def test_fuser_files_do_not_import_one_another_nor_backbones() -> None:
    folder = Path(layerfuse.fusers.__file__).parent
    for path in folder.glob("*.py"):
        if path.stem in ("__init__", "base"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("layerfuse"):
                assert not node.module.startswith("layerfuse.backbones"), path.name
                assert node.module in ("layerfuse.fusers.base",) or "fusers" not in node.module, path.name


def test_an_unknown_fuser_gets_the_nearest_name_and_the_list() -> None:
    with pytest.raises(
        ValueError, match="fuser 'mmfusr' is unknown; did you mean 'mmfuser'. Known: .*average, .*concat"
    ):
        create_fuser("mmfusr", in_channels=8, num_layers=2)


def test_an_unknown_option_gets_the_nearest_name_and_the_list() -> None:
    with pytest.raises(ValueError, match="option of fuser 'mmfuser' 'num_head' is unknown; did you mean 'num_heads'"):
        create_fuser("mmfuser", in_channels=8, num_layers=2, options={"num_head": 2})
    with pytest.raises(ValueError, match="option of fuser 'average' 'norm' is unknown. Known: none"):
        create_fuser("average", in_channels=8, num_layers=2, options={"norm": "layer"})


def test_a_missing_option_is_named() -> None:
    @FUSERS.register("test_needy")
    class Needy(Unnamed):
        def __init__(self, in_channels: int | Sequence[int], num_layers: int, *, rank: int) -> None:
            super().__init__(in_channels, num_layers)

    try:
        with pytest.raises(ValueError, match="fuser 'test_needy' needs the options rank; give them in options"):
            create_fuser("test_needy", in_channels=8, num_layers=2)
        assert create_fuser("test_needy", in_channels=8, num_layers=2, options={"rank": 3}).config["rank"] == 3
    finally:
        FUSERS._entries.pop("test_needy")


class Ranked(Unnamed):
    """With arguments that it hands to nobody."""

    def __init__(
        self, in_channels: int | Sequence[int], num_layers: int, rank: int = 1, *, shape: Sequence[int] = (2, 3)
    ) -> None:
        super().__init__(in_channels, num_layers)
        rank += 1  # what was given is noted, not what became of it


class RankedChild(Ranked):
    """Without a constructor of its own."""


@pytest.mark.parametrize("fuser_class", [Ranked, RankedChild])
def test_constructor_arguments_are_noted_as_they_are_given(fuser_class: type[Ranked]) -> None:
    assert fuser_class(8, 2).options == {"rank": 1, "shape": (2, 3)}
    fuser = fuser_class(8, 2, 5, shape=[7])
    assert fuser.options == {"rank": 5, "shape": [7]}
    assert list(fuser.config) == ["name", "in_channels", "num_layers", "rank", "shape"]
    assert fuser_class(num_layers=2, in_channels=[8, 8], rank=4).config["rank"] == 4
    for twin in (copy.deepcopy(fuser), pickle.loads(pickle.dumps(fuser))):
        assert twin.config == fuser.config and type(twin) is fuser_class


def test_a_fuser_takes_no_arguments_but_its_own() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        Ranked(8, 2, size=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'num_layers'"):
        Ranked(8)  # type: ignore[call-arg]
    assert Unnamed(8, 2).options == {}


def test_options_that_are_passed_up_by_hand_still_count_with_a_warning() -> None:
    class Old(Unnamed):
        def __init__(self, in_channels: int | Sequence[int], num_layers: int, *, rank: int = 1, bias: int = 0) -> None:
            Fuser.__init__(self, in_channels, num_layers, options={"rank": str(rank), "other": 1})

    with pytest.warns(DeprecationWarning, match="Old passes options to Fuser.__init__, which is deprecated") as caught:
        fuser = Old(8, 2, rank=3)
    assert caught[0].filename == __file__
    assert fuser.options == {"rank": "3", "bias": 0}


def test_an_incomplete_fuser_cannot_be_built() -> None:
    class Incomplete(Fuser):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Incomplete(8, 2)


def test_a_config_needs_name_widths_and_count() -> None:
    with pytest.raises(ValueError, match="the fuser config lacks name, num_layers; got the keys in_channels"):
        fuser_from_config({"in_channels": 8})
    with pytest.raises(ValueError, match="lacks name, in_channels, num_layers; got the keys none"):
        fuser_from_config({})


def test_an_unknown_key_in_a_config_is_refused() -> None:
    with pytest.raises(ValueError, match="option of fuser 'select' 'indx' is unknown; did you mean 'index'"):
        fuser_from_config({"name": "select", "in_channels": 8, "num_layers": 2, "indx": 0})


def test_widths_are_one_number_or_one_per_map() -> None:
    with pytest.raises(ValueError, match=r"in_channels has 2 widths \(8, 8\) for num_layers=3"):
        Select([8, 8], 3)
    with pytest.raises(ValueError, match="in_channels is 8, 0; widths must be at least 1"):
        Select([8, 0], 2)
    assert Select([8, 4], 2).out_channels == 4


def test_at_least_one_map_is_needed() -> None:
    with pytest.raises(ValueError, match="num_layers is 0; a fuser needs at least one map"):
        Select(8, 0)


class _EntryPoint:
    """What importlib.metadata returns for an installed package's fuser."""

    name = "outside"

    def load(self) -> type[Fuser]:
        return Unnamed


def test_fusers_of_other_packages_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def entry_points(*, group: str) -> list[_EntryPoint]:
        asked.append(group)
        return [_EntryPoint()]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    monkeypatch.setattr(FUSERS, "_outside", None)
    monkeypatch.setattr(Unnamed, "name", "outside")
    try:
        assert "outside" in FUSERS.names()
        assert isinstance(create_fuser("outside", in_channels=8, num_layers=2), Unnamed)
    finally:
        FUSERS._entries.pop("outside", None)
    assert asked == ["layerfuse.fusers"]


def test_an_entry_point_to_a_class_of_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSERS._entries, "outside", Unnamed)
    with pytest.raises(ValueError, match="entry point 'outside' leads to Unnamed, which is named ''; decorate"):
        create_fuser("outside", in_channels=8, num_layers=2)


def test_default_layers_are_those_that_the_fusers_source_taps() -> None:
    assert FUSERS.get("mmfuser").default_layers(24) == (3, 8, 13, 18, 23)
    assert FUSERS.get("mmfuser").default_layers(12) is None
    assert [FUSERS.get("select").default_layers(depth) for depth in (12, 24)] == [(11,), (23,)]
    vip_llava = pytest.importorskip("transformers").VipLlavaConfig().vision_feature_layers
    assert FUSERS.get("concat").default_layers(24) == resolve_layers(vip_llava, 24)
    assert FUSERS.get("concat").default_layers(27) is None
    assert Unnamed.default_layers(24) is None


def test_printing_a_fuser_shows_how_it_was_built() -> None:
    assert "index=0" in repr(Select(8, 2, index=0))


def test_a_fuser_in_a_file_of_its_own_works_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_first_fuser.py").write_text(
        "from layerfuse.fusers import FUSERS, Fuser\n\n"
        '@FUSERS.register("mine")\n'
        "class Mine(Fuser):\n"
        "    def __init__(self, in_channels, num_layers, *, factor=2.0):\n"
        "        super().__init__(in_channels, num_layers)\n"
        "        self.factor = factor\n\n"
        "    def fuse(self, features):\n"
        "        return self.factor * features.maps[-1]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_first_fuser")
    try:
        fuser = create_fuser("mine", in_channels=8, num_layers=2, options={"factor": 3.0})
        features = random_features(8, num_layers=2)
        torch.testing.assert_close(fuser(features), 3 * features.maps[-1])
        assert fuser.config == {"name": "mine", "in_channels": 8, "num_layers": 2, "factor": 3.0}
    finally:
        FUSERS._entries.pop("mine")


def test_each_choice_of_grids_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    forward = Fuser.forward
    monkeypatch.setattr(Fuser, "forward", lambda self, *given: (runs.append(1), forward(self, *given))[1])
    fuser, small, large = create_fuser("mmfuser", in_channels=16, num_layers=3), [(2, 3)] * 3, [(4, 6)] * 3
    first, other = fuser.cost(small), fuser.cost(large)
    assert (len(runs), other.flops > first.flops) == (2, True)
    assert (fuser.cost(tuple(small)), copy.deepcopy(fuser).cost(large), len(runs)) == (first, other, 2)
