"""FeatureMaps: a value that checks itself and carries its geometry."""

from __future__ import annotations

import io
import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from layerfuse import FeatureMaps
from layerfuse.errors import InputError
from layerfuse.files import read_safetensors_metadata
from layerfuse.testing import random_features, random_images, tiny_backbone


def test_properties_describe_the_maps() -> None:
    maps = (torch.zeros(2, 6, 8), torch.zeros(2, 4, 5))
    features = FeatureMaps(maps=maps, layers=(3, 0), grids=((2, 3), (4, 1)))
    assert (len(features), features.batch_size, features.channels) == (2, 2, (8, 5))
    assert [feature_map.shape for feature_map in features] == [(2, 6, 8), (2, 4, 5)]


@given(height=st.integers(1, 5), width=st.integers(1, 5), channels=st.integers(1, 4))
def test_nchw_unfolds_rows_first_without_a_copy(height: int, width: int, channels: int) -> None:
    tokens = torch.arange(height * width * channels, dtype=torch.float32).reshape(1, height * width, channels)
    features = FeatureMaps(maps=(tokens,), layers=(1,), grids=((height, width),))
    spatial = features.nchw(0)
    assert spatial.shape == (1, channels, height, width)
    torch.testing.assert_close(
        spatial[0, :, height - 1, width - 1], tokens[0, (height - 1) * width + width - 1], rtol=0, atol=0
    )
    assert spatial.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()


def test_layer_returns_the_map_of_that_number() -> None:
    features = FeatureMaps(maps=(torch.zeros(1, 1, 2), torch.ones(1, 1, 2)), layers=(4, 2), grids=((1, 1), (1, 1)))
    torch.testing.assert_close(features.layer(2), torch.ones(1, 1, 2))
    with pytest.raises(KeyError, match="layer 3 was not tapped; tapped layers: 4, 2"):
        features.layer(3)


@pytest.mark.parametrize(
    ("maps", "layers", "grids", "prefix", "message"),
    [
        ((), (), (), (), "at least one map"),
        ((torch.zeros(1, 4, 2),), (1, 2), ((2, 2),), (), "1 maps, 2 layers, 1 grids"),
        ((torch.zeros(1, 4, 2),), (1,), ((2, 2),), (torch.zeros(1, 1, 2),) * 2, "2 prefix tensors"),
        ((torch.zeros(4, 2),), (1,), ((2, 2),), (), r"shape \(4, 2\); expected three dimensions"),
        ((torch.zeros(1, 5, 2),), (7,), ((2, 2),), (), "layer 7 has 5 tokens, but its grid 2x2 has 4"),
        (
            (torch.zeros(1, 4, 2), torch.zeros(2, 4, 2)),
            (1, 2),
            ((2, 2), (2, 2)),
            (),
            "layer 2 has batch size 2, the first map has 1",
        ),
    ],
)
def test_disagreeing_fields_are_refused(maps, layers, grids, prefix, message) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureMaps(maps=maps, layers=layers, grids=grids, prefix=prefix)


def test_sources_are_one_per_map_or_none() -> None:
    features = random_features(8, num_layers=2)
    assert features.sources == () and replace(features, sources=(0, 1)).sources == (0, 1)
    with pytest.raises(InputError, match="2 maps, .* and 1 sources"):
        replace(features, sources=(0,))


def test_a_layer_of_two_backbones_is_taken_by_its_position() -> None:
    features = replace(random_features(8, num_layers=2), layers=(4, 4), sources=(0, 1))
    with pytest.raises(InputError, match=r"2 maps are of layer 4 \(layers \(4, 4\), sources \(0, 1\)\); take one by"):
        features.layer(4)
    assert features[1] is features.maps[1] and features[-2] is features.maps[0]


def test_the_old_name_of_nchw_says_the_new_one() -> None:
    features = random_features(8, grids=[(2, 3)])
    with pytest.warns(DeprecationWarning, match="spatial is deprecated; call nchw"):
        spatial = features.spatial(0)
    assert torch.equal(spatial, features.nchw(0)) and spatial.shape == (2, 8, 2, 3)


def test_map_to_and_detach_reach_maps_and_prefix_tokens() -> None:
    features = replace(random_features(8, num_layers=2, num_prefix_tokens=1, requires_grad=True), sources=(0, 1))
    halved = features.map(lambda tokens: tokens[:1] / 2)
    assert torch.equal(halved[1], features[1][:1] / 2) and torch.equal(halved.prefix[0], features.prefix[0][:1] / 2)
    for moved in (features.to(torch.float64), features.to("cpu", torch.float64), features.to(dtype=torch.float64)):
        assert {tensor.dtype for tensor in (*moved, *moved.prefix)} == {torch.float64}
    away = features.to("meta", non_blocking=True)
    assert all(tensor.is_meta and tensor.dtype == torch.float32 for tensor in (*away, *away.prefix))
    apart = features.detach()
    assert not any(tensor.requires_grad for tensor in (*apart, *apart.prefix))
    assert apart[0].data_ptr() == features[0].data_ptr()
    for other in (halved, away, apart):
        assert (other.layers, other.grids, other.sources) == (features.layers, features.grids, (0, 1))
    with pytest.raises(InputError, match="has 15 tokens, but its grid 4x4 has 16"):
        features.map(lambda tokens: tokens[:, 1:])


def test_batches_are_joined_with_all_that_belongs_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    features = replace(random_features(8, num_layers=2, num_prefix_tokens=1, batch_size=3), sources=(0, 1))
    parts = [features.map(lambda tokens, at=at: tokens[at]) for at in (slice(1), slice(1, 3))]
    joined = FeatureMaps.cat(parts)
    assert (joined.layers, joined.grids, joined.sources) == (features.layers, features.grids, (0, 1))
    assert all(map(torch.equal, (*joined, *joined.prefix), (*features, *features.prefix)))
    assert FeatureMaps.cat([random_features(8)]).prefix == ()
    with pytest.raises(InputError, match="got no feature maps; give at least one"):
        FeatureMaps.cat([])
    with pytest.raises(InputError, match=r"layers, grids, sources.*join maps of the same"):
        FeatureMaps.cat([features, replace(features, sources=())])

    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    features.pin_memory()
    assert [id(tensor) for tensor in pinned] == [id(tensor) for tensor in (*features, *features.prefix)]


def test_torch_sees_the_tensors_and_leaves_the_geometry_alone() -> None:
    features = replace(random_features(8, grids=[(2, 3), (1, 4)], num_prefix_tokens=1), sources=(0, 1))
    leaves, spec = pytree.tree_flatten(features)
    assert [id(leaf) for leaf in leaves] == [id(tensor) for tensor in (*features.maps, *features.prefix)]
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(features)[0]]
    assert names == [".maps[0]", ".maps[1]", ".prefix[0]", ".prefix[1]"]
    again = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))
    assert again.maps == features.maps and again.prefix == features.prefix
    assert (again.layers, again.grids, again.sources) == (features.layers, features.grids, features.sources)


@pytest.mark.parametrize("leaf", [None, "name", torch.zeros(())], ids=["none", "name", "scalar"])
def test_leaves_that_are_no_maps_are_not_checked(leaf: object) -> None:
    features = random_features(8, num_layers=2)
    assert pytree.tree_map(lambda _: leaf, features).maps == (leaf, leaf)


def test_vmap_runs_over_feature_maps_and_returns_them() -> None:
    features = random_features(8, num_layers=2, num_prefix_tokens=1)
    stacked = pytree.tree_map(lambda tensor: torch.stack([tensor, tensor + 1]), features)
    doubled = torch.func.vmap(lambda inner: inner.map(lambda tokens: 2 * tokens))(stacked)
    assert isinstance(doubled, FeatureMaps) and doubled.grids == features.grids
    for result, tensor in zip((*doubled, *doubled.prefix), (*features, *features.prefix), strict=True):
        torch.testing.assert_close(result, 2 * torch.stack([tensor, tensor + 1]))


def test_a_compiled_function_builds_feature_maps_again() -> None:
    features = random_features(8, num_layers=2, num_prefix_tokens=1)

    def work(inner: FeatureMaps) -> FeatureMaps:
        return pytree.tree_map(lambda tensor: 2 * tensor, inner).to(torch.float64)

    result = torch.compile(work, fullgraph=True, backend="eager")(features)
    torch.testing.assert_close(result.maps, work(features).maps)
    assert (result.layers, result.grids) == (features.layers, features.grids)


@pytest.mark.parametrize("family", ["timm", "open_clip", "transformers", "module"])
def test_a_backbone_alone_is_exported_for_any_batch_and_returns_feature_maps(family: str) -> None:
    backbone = tiny_backbone(family)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(backbone, (random_images(2),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue()))
    for images in (random_images(1), random_images(5, seed=1)):
        expected = backbone(images)
        for module in (program.module(), loaded.module()):
            result = module(images)
            assert isinstance(result, FeatureMaps)
            torch.testing.assert_close((*result.maps, *result.prefix), (*expected.maps, *expected.prefix))
            assert (result.layers, result.grids) == (expected.layers, expected.grids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_feature_maps_come_back_from_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    features = random_features([8, 4], grids=[(2, 3), (1, 4)], num_prefix_tokens=1, dtype=dtype)
    states = torch.randn(2, 7, 8).to(dtype)
    # Views of one tensor, as a backbone gives them, and one tensor twice.
    views = FeatureMaps((states[:, 1:],) * 2, (1, 2), ((2, 3),) * 2, (states[:, :1],) * 2, (0, 1))
    for number, maps in enumerate((features, views, replace(features, prefix=()))):
        maps.save(tmp_path / f"{number}.safetensors")
        loaded = FeatureMaps.load(str(tmp_path / f"{number}.safetensors"))
        torch.testing.assert_close((*loaded.maps, *loaded.prefix), (*maps.maps, *maps.prefix), rtol=0, atol=0)
        assert (loaded.layers, loaded.grids, loaded.sources) == (maps.layers, maps.grids, maps.sources)
        assert type(loaded.grids) is type(loaded.grids[0]) is tuple
    assert len(os.listdir(tmp_path)) == 3


def test_eleven_maps_come_back_in_their_order(tmp_path: Path) -> None:
    features = random_features(2, num_layers=11, grids=(1, 1))
    features.save(tmp_path / "maps.safetensors")
    torch.testing.assert_close(FeatureMaps.load(tmp_path / "maps.safetensors").maps, features.maps, rtol=0, atol=0)


def test_some_images_of_a_file_are_read_alone_beside_maps_without_prefix_tokens(tmp_path: Path) -> None:
    features = random_features(4, num_layers=2, batch_size=5, num_prefix_tokens=1)
    features = replace(features, prefix=(features.prefix[0], features.prefix[1][:, :0]), sources=(0, 1))
    features.save(tmp_path / "maps.safetensors", metadata={"of": "noise"})
    loaded = FeatureMaps.load(tmp_path / "maps.safetensors", images=slice(2, 4))
    expected = features.map(lambda tokens: tokens[2:4])
    torch.testing.assert_close((*loaded.maps, *loaded.prefix), (*expected.maps, *expected.prefix), rtol=0, atol=0)
    assert read_safetensors_metadata(tmp_path / "maps.safetensors")["of"] == "noise"


def test_a_save_that_fails_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maps.safetensors"
    features = random_features(8, num_layers=2)
    features.save(path)

    def no_room(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        random_features(8, num_layers=2, seed=1).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(FeatureMaps.load(path)[0], features[0])


def test_files_without_feature_maps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    with pytest.raises(FileNotFoundError, match=r"maps\.safetensors is no file; give one that FeatureMaps.save wrote"):
        FeatureMaps.load(path)
    save_file({"maps.0": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="holds tensors but no feature maps"):
        FeatureMaps.load(path)
    random_features(8, num_layers=2).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        FeatureMaps.load(path)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resampling_gives_all_maps_one_grid(mode: str, dtype: torch.dtype) -> None:
    features = random_features([4, 3], grids=[(2, 5), (3, 4)], num_prefix_tokens=1, dtype=dtype)
    resampled = features.resample((3, 4), mode)
    assert resampled.grids == ((3, 4), (3, 4)) and [tokens.shape for tokens in resampled] == [(2, 12, 4), (2, 12, 3)]
    assert resampled[0].dtype == dtype and resampled[1] is features[1] and resampled.prefix[0] is features.prefix[0]
    constant = features.map(torch.ones_like).resample((4, 1), mode)
    torch.testing.assert_close(constant[0], torch.ones(2, 4, 4, dtype=dtype))


def test_maps_are_taken_with_all_that_belongs_to_them() -> None:
    features = random_features([4, 3, 5], grids=[(2, 5), (3, 4), (1, 1)], num_prefix_tokens=1)
    taken = replace(features, sources=(0, 1, 1)).take((2, 0))
    assert (taken.grids, taken.sources) == (((1, 1), (2, 5)), (1, 0))
    assert taken.layers == (features.layers[2], features.layers[0])
    assert taken[0] is features[2] and taken.prefix[1] is features.prefix[0]
    assert features.take([1]).sources == ()
    with pytest.raises(ValueError, match="needs at least one map"):
        features.take(())


def test_corner_cells_stay_on_corner_cells() -> None:
    features = random_features(4, num_layers=1, grids=(3, 5))
    resampled = features.resample((7, 9)).nchw(0)
    torch.testing.assert_close(resampled[..., ::3, ::4], features.nchw(0)[..., ::2])


def test_the_nearest_cell_is_repeated() -> None:
    features = random_features(4, num_layers=1, grids=(2, 3))
    expected = features.nchw(0).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(features.resample((4, 6), "nearest").nchw(0), expected)


def test_an_unknown_way_of_resampling_is_refused() -> None:
    known = r"Known: bicubic, bilinear, nearest\."
    with pytest.raises(InputError, match=rf"mode 'linear' is unknown; did you mean 'bilinear'\? {known}"):
        random_features(4).resample((2, 2), "linear")
    for mode in (None, 2, ["bilinear"]):
        with pytest.raises(InputError, match=rf"^resampling mode {re.escape(repr(mode))} is unknown\. {known}"):
            random_features(4).resample((2, 2), mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [[2, 3], np.array([2, 3]), (np.int64(2), np.int32(3)), torch.Size([2, 3])], ids=repr)
def test_a_grid_of_any_kind_becomes_a_pair_of_ints(grid: Any) -> None:
    features = random_features(4, num_layers=2, grids=(3, 5))
    resampled = features.resample(grid)
    assert resampled.grids == ((2, 3), (2, 3)) and {type(edge) for each in resampled.grids for edge in each} == {int}
    assert isinstance(resampled.grids[0], tuple) and all(map(torch.equal, resampled, features.resample((2, 3))))
    there = random_features(4, num_layers=1, grids=(2, 3))
    assert there.resample(grid)[0] is there[0]


IMPOSSIBLE_GRIDS = [3, None, "23", (3,), (2, 3, 4), (0, 3), (2, -1), (2.0, 3), ("2", "3"), (True, 3), [[2, 3], [2, 3]]]


@pytest.mark.parametrize("grid", IMPOSSIBLE_GRIDS, ids=repr)
def test_an_impossible_grid_is_refused(grid: Any) -> None:
    with pytest.raises(InputError, match=r"^grid is .*; give \(H, W\) in patches, two whole numbers, both at least 1"):
        random_features(4, num_layers=1, grids=(2, 3)).resample(grid)
    with pytest.raises(InputError, match=r"^the grid of layer 7 is .*; give \(H, W\) in patches"):
        FeatureMaps((torch.zeros(1, 6, 4),), layers=(7,), grids=(grid,))


def test_lists_become_the_tuples_that_the_fields_are() -> None:
    tokens = torch.zeros(1, 6, 4)
    features = FeatureMaps([tokens], layers=[7], grids=[[2, 3]], prefix=[tokens], sources=[0])  # type: ignore[arg-type]
    expected = FeatureMaps((tokens,), layers=(7,), grids=((2, 3),), prefix=(tokens,), sources=(0,))
    assert [getattr(features, field.name) for field in fields(features)] == [
        getattr(expected, field.name) for field in fields(expected)
    ]
    assert pytree.tree_structure(features) == pytree.tree_structure(expected)


@pytest.mark.parametrize(("mode", "row"), [("bilinear", 0), ("bicubic", 0), ("nearest", 2)])
def test_a_single_row_is_the_one_that_the_docstring_names(mode: str, row: int) -> None:
    features = random_features(4, num_layers=1, grids=(5, 3))
    resampled = features.resample((1, 3), mode)
    torch.testing.assert_close(resampled.nchw(0)[:, :, 0], features.nchw(0)[:, :, row])
