"""Feature maps on disk: what comes back, what has a key of its own, and files that are damaged or half-written."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from integrations.llava.data.feature_cache import FeatureCache, open_feature_cache, picture_digest, tile_bytes
from integrations.llava.image_layout import AnyResLayout, FixedLayout
from layerfuse import Backbone, BackboneGroup, FeatureMaps
from layerfuse.testing import random_features, tiny_backbone
from tests.integrations.llava.training.process_pairs import Nursery

DIGEST, SIZE = "ab" * 20, (48, 64)
COMPUTED: dict[str, Any] = {"device": "cpu", "autocast": False}


def open_cache(folder: Path, backbone: Any = None, **changes: Any) -> FeatureCache:
    backbone = backbone or tiny_backbone("timm", layers=(1, -1))
    given = {"preprocessing": backbone.preprocessing, "layout": FixedLayout(1, 16), "stored": "fp32"}
    return open_feature_cache(folder, backbone, **{**given, "computed": COMPUTED, **changes})


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize(("stored", "error"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 0.5 / 127)])
@pytest.mark.parametrize("tiles", [1, 3])
def test_maps_come_back_with_prefix_tokens_and_size(stored: Any, error: float, tiles: int, tmp_path: Path) -> None:
    backbone = tiny_backbone("timm", layers=(1, -1))
    features = backbone(torch.randn(tiles, 3, 32, 32)).detach()
    cache = open_cache(tmp_path / "cache", backbone, stored=stored)
    assert not cache.holds(DIGEST) and cache.read(DIGEST) is None
    cache.write(DIGEST, features, SIZE)
    assert cache.holds(DIGEST)
    found = cache.read(DIGEST)
    assert found is not None and found[1] == SIZE
    assert (found[0].layers, found[0].grids, found[0].sources) == (features.layers, features.grids, ())
    assert len(features.prefix) == 2
    for got, given in zip((*found[0], *found[0].prefix), (*features, *features.prefix), strict=True):
        assert got.dtype == (torch.bfloat16 if stored == "bf16" else torch.float32)
        assert ((got.float() - given).abs() <= error * given.abs().amax(-1, keepdim=True)).all()
    most, heads = tiles * tile_bytes(backbone, stored), tiles * 2 * 400
    assert most - heads < sum(path.stat().st_size for path in files(tmp_path)) <= most


def test_maps_of_bfloat16_are_kept_as_they_are_and_zeros_stay_zeros(tmp_path: Path) -> None:
    backbone = tiny_backbone("timm", layers=(1,)).to(torch.bfloat16)
    features = backbone(torch.randn(1, 3, 32, 32)).detach().map(lambda tokens: tokens * (tokens > 0))
    for stored in ("fp32", "bf16", "int8"):
        cache = open_cache(tmp_path, backbone, stored=stored)
        cache.write(DIGEST, features, SIZE)
        found = cache.read(DIGEST)
        assert found is not None and not found[0][0][features[0] == 0].any()
        assert stored == "int8" or torch.equal(found[0][0], features[0])


@pytest.mark.parametrize("resample", [None, "bilinear"])
def test_maps_of_several_backbones_come_back_in_their_order(resample: str | None, tmp_path: Path) -> None:
    def member(**options: Any) -> Backbone:
        backbone = tiny_backbone("timm", **options)
        backbone.requires_grad_(False)
        return backbone

    members = [member(layers=(1, 2)), member(layers=(2,), image_size=64, embed_dim=48)]
    group = BackboneGroup(members, resample=resample, order=(2, 0, 1))
    features = group(torch.randn(2, 6, 64, 64)) if resample is None else group(torch.randn(2, 6, *group.image_size))
    cache = open_cache(tmp_path, group)
    assert [own.grid for own in cache.maps] == list(features.grids)
    cache.write(DIGEST, features, SIZE)
    found = cache.read(DIGEST)
    assert found is not None
    assert (found[0].layers, found[0].grids, found[0].sources) == (features.layers, features.grids, (1, 0, 0))
    for got, given in zip((*found[0], *found[0].prefix), (*features, *features.prefix), strict=True):
        assert torch.equal(got, given)
    # What one of them sees alone is the same map, unless it was brought to another grid.
    alone = open_cache(tmp_path, members[1])
    assert alone.holds(DIGEST) == (resample is None)


def changed_weight(backbone: Any) -> None:
    with torch.no_grad():
        next(backbone.parameters()).view(-1)[0] += 1e-3


ANYRES = AnyResLayout(1, (32, 32), (4, 4), ((32, 64),))


@pytest.mark.parametrize(
    "change",
    [
        lambda backbone: {"preprocessing": backbone.preprocessing.changed(mode="pad")},
        lambda backbone: {"preprocessing": backbone.preprocessing.changed(upright=True)},
        lambda backbone: {"stored": "bf16"},
        lambda backbone: {"computed": COMPUTED | {"autocast": True}},
        lambda backbone: {"layout": ANYRES},
        lambda backbone: {"layout": replace(ANYRES, pinpoints=((64, 32),))},
        lambda backbone: changed_weight(backbone) or {},
        lambda backbone: backbone.to(torch.bfloat16) and {},
    ],
)
def test_whatever_changes_the_maps_changes_their_place(change: Callable[[Any], Any], tmp_path: Path) -> None:
    backbone = tiny_backbone("timm", layers=(1, -1))
    features = random_features(32, num_layers=2, batch_size=1, num_prefix_tokens=1)
    cache = open_cache(tmp_path, backbone)
    cache.write(DIGEST, features, SIZE)
    open_cache(tmp_path, backbone, layout=ANYRES).write("cd" * 20, features, SIZE)
    assert open_cache(tmp_path, backbone).holds(DIGEST)
    assert open_cache(tmp_path, backbone, layout=replace(ANYRES, grid=(2, 2))).holds("cd" * 20), "of the fuser alone"
    other = open_cache(tmp_path, backbone, **change(backbone))
    assert not other.holds(DIGEST) and not ({own.folder for own in other.maps} & {own.folder for own in cache.maps})
    assert not cache.holds("cd" * 20)


def test_layers_are_shared_whatever_else_is_tapped(tmp_path: Path) -> None:
    deep = tiny_backbone("timm", layers=(1, 2, -1))
    features = deep(torch.randn(1, 3, 32, 32)).detach()
    open_cache(tmp_path, deep).write(DIGEST, features, SIZE)
    shallow = tiny_backbone("timm", layers=(2, 1))
    shallow.load_state_dict({name: deep.state_dict()[name] for name in shallow.state_dict()})
    found = open_cache(tmp_path, shallow).read(DIGEST)
    assert found is not None and found[0].layers == (2, 1)
    assert torch.equal(found[0][0], features[1]) and torch.equal(found[0][1], features[0])
    assert torch.equal(found[0][0], shallow(torch.randn(1, 3, 32, 32))[0]) is False
    # Layers 0 and 3 are not there: both are computed, and what was there stays.
    more = tiny_backbone("timm", layers=(0, 1))
    more.load_state_dict({name: deep.state_dict()[name] for name in more.state_dict()})
    assert not open_cache(tmp_path, more).holds(DIGEST)
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    open_cache(tmp_path, more).write(DIGEST, more(torch.randn(1, 3, 32, 32)).detach(), SIZE)
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(files(tmp_path)) == 4


def test_an_image_is_known_by_its_bytes(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    digests = [picture_digest(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def flip_size(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(SIZE[1].to_bytes(8, "little")) == 1
    path.write_bytes(content.replace(SIZE[1].to_bytes(8, "little"), (65).to_bytes(8, "little")))


def of_another_kind(path: Path) -> None:
    random_features(32).save(path)


@pytest.mark.parametrize("damage", [cut, flip, flip_size, of_another_kind, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_said_and_removed(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = random_features(32, num_layers=2, batch_size=1, num_prefix_tokens=1)
    cache = open_cache(tmp_path)
    cache.write(DIGEST, features, SIZE)
    damaged = files(tmp_path)[0]
    damage(damaged)
    with caplog.at_level(logging.WARNING):
        assert cache.read(DIGEST) is None
    assert re.search(rf"feature cache: {damaged} is damaged \(.+\); its image is encoded again", caplog.text)
    assert not damaged.exists() and not cache.holds(DIGEST)
    cache.write(DIGEST, features, SIZE)
    assert cache.read(DIGEST) is not None
    if damage is cut:
        cut(damaged)
        assert not cache.holds(DIGEST) and not damaged.exists()


def write_for_ever(rank: int, folder: str, first: int) -> None:
    """Write images' maps, the same two hundred again and again, until it is killed; or those from a first one on."""
    cache = open_cache(Path(folder))
    features = random_features(32, num_layers=2, batch_size=4, num_prefix_tokens=1)
    for turn in range(200 if first else 10**9):
        number = (first * rank + turn) % 200
        if not first and turn >= 200:
            for own in cache.maps:
                own.file(f"{number:040d}").unlink()
        cache.write(f"{number:040d}", features, SIZE)


def whole_files(folder: Path) -> int:
    cache, whole = open_cache(folder), 0
    for digest in {path.stem for path in files(folder)}:
        for own in cache.maps:
            if own.file(digest).exists():
                alone = FeatureCache([own], stored="fp32", several=False)
                assert alone.read(digest) is not None
                whole += 1
    return whole


def test_a_writer_that_is_killed_leaves_whole_files_alone(
    nursery: Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with nursery.alone(f"{__name__}:write_for_ever", str(tmp_path), 0) as writer:
        deadline = time.monotonic() + 60
        while len(files(tmp_path)) < 300 and time.monotonic() < deadline:
            time.sleep(0.01)
        writer.send(signal.SIGKILL)
        writer.wait()
    assert whole_files(tmp_path) >= 290 and not caplog.records


def test_two_processes_write_into_one_folder(nursery: Nursery, tmp_path: Path) -> None:
    ended = nursery.run(f"{__name__}:write_for_ever", str(tmp_path), 100)
    assert [each.code for each in ended] == [0, 0], ended
    assert whole_files(tmp_path) == 400
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert {path.name for path in left} == {"map.json"} and os.listdir(tmp_path)


def test_maps_have_the_backbones_sources_only_where_there_are_several(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.write(DIGEST, random_features(32, num_layers=2, batch_size=1, num_prefix_tokens=1), SIZE)
    found = cache.read(DIGEST)
    assert found is not None and isinstance(found[0], FeatureMaps) and found[0].sources == ()
