"""Feature maps of a folder of pictures on disk: resumed, refused, read one by one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import layerfuse.store
from layerfuse import Backbone, BackboneGroup, create_backbone
from layerfuse.cli import main
from layerfuse.pictures import picture_names, read_picture
from layerfuse.store import FeatureStore, extract_folder
from layerfuse.testing import tiny_backbone
from tests.killed_extraction import OPTIONS
from tests.run_support import run_ready_python
from tests.source_support import ROOT


def draw(folder: Path, count: int) -> Path:
    """Write small pictures of noise, every other one in a folder of its own."""
    noise = np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for number in range(count):
        pixels = noise.integers(0, 256, (20, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if number % 2 else ".") / f"{number:03}.png")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw(tmp_path / "pictures", 7)


@pytest.fixture
def backbone() -> Backbone:
    return tiny_backbone(layers=(2, 0))


def assert_holds(store: FeatureStore, backbone: Backbone | BackboneGroup, pictures: Path, tolerance: float = 0) -> None:
    """The store has every picture of the folder, with the maps that the backbone gives."""
    assert list(store) == picture_names(pictures)
    for name, features in store.items():
        with torch.no_grad():
            expected = backbone(backbone.prepare(read_picture(pictures / name)))
        assert (features.layers, features.grids, features.sources) == (
            expected.layers,
            expected.grids,
            expected.sources,
        )
        for ours, direct in zip((*features.maps, *features.prefix), (*expected.maps, *expected.prefix), strict=True):
            torch.testing.assert_close(ours, direct, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="extractions are forked")
def test_200_pictures_are_whole_after_extractions_that_were_killed_at_random_moments(tmp_path: Path) -> None:
    folder, out = draw(tmp_path / "pictures", 200), tmp_path / "store"
    program = str(ROOT / "tests" / "killed_extraction.py")
    left = json.loads(run_ready_python(program, str(folder), str(out), folder=ROOT).splitlines()[-1])
    assert left[0] < 200 and len({count for count in left if 0 < count < 200}) >= 4, left
    assert left == sorted(left)
    store = FeatureStore(out)
    torch.manual_seed(0)
    direct = create_backbone(OPTIONS[1], layers=(1, -1), pretrained=False, image_size=32)
    assert_holds(store, direct, folder, tolerance=1e-5)
    assert store.about["notes"] == {"model": OPTIONS[1], "pretrained": False}
    assert {path.name.partition("-")[0] for path in out.iterdir()} == {"shard", "store.json"}


def test_a_store_is_a_mapping_that_reads_a_picture_when_it_is_asked_for(
    pictures: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    bad = extract_folder(
        pictures, backbone, tmp_path / "store", batch_size=1, shard_size=3, report=lambda *both: told.append(both)
    )
    assert bad == {} and told == [(done, 7) for done in range(1, 8)]
    assert len(list((tmp_path / "store").glob("shard-*"))) == 3
    store = FeatureStore(tmp_path / "store")
    assert_holds(store, backbone, pictures)
    assert len(store) == 7 and "more/001.png" in store and store.names[:2] == ("000.png", "002.png")
    read: list[Path] = []
    load = layerfuse.store.FeatureMaps.load
    monkeypatch.setattr(
        layerfuse.store.FeatureMaps, "load", lambda path, images: (read.append(path), load(path, images))[1]
    )
    items = iter(FeatureStore(tmp_path / "store").items())
    assert not read
    assert next(items)[1].batch_size == 1 and len(read) == 1
    with pytest.raises(KeyError, match=r"picture '001.png' is not in .*, which has 7 of them \(000.png"):
        store["001.png"]


def test_numbers_are_stored_in_the_type_asked_for(pictures: Path, backbone: Backbone, tmp_path: Path) -> None:
    extract_folder(pictures, backbone, tmp_path / "store", dtype=torch.bfloat16, batch_size=1)
    stored = FeatureStore(tmp_path / "store")["000.png"]
    with torch.no_grad():
        direct = backbone(backbone.prepare(read_picture(pictures / "000.png")))
    assert stored[0].dtype == torch.bfloat16
    torch.testing.assert_close(stored[1], direct[1].bfloat16(), rtol=0, atol=0)


def test_maps_of_several_backbones_are_stored_too(pictures: Path, tmp_path: Path) -> None:
    group = BackboneGroup([tiny_backbone(layers=(1, 3)), tiny_backbone(layers=(1,), seed=1, embed_dim=16)])
    extract_folder(pictures, group, tmp_path / "store", batch_size=1)
    assert_holds(FeatureStore(tmp_path / "store"), group, pictures)


def test_pictures_that_come_later_are_added_and_broken_ones_named_and_tried_again(
    pictures: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, broken = tmp_path / "store", pictures / "more" / "broken.JPG"
    broken.write_bytes((pictures / "000.png").read_bytes()[:60])
    assert {*extract_folder(pictures, backbone, out, batch_size=2, shard_size=4)} == {"more/broken.JPG"}
    assert "more/broken.JPG cannot be read (" in caplog.text
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(FeatureStore(out)) == 7
    shutil.copy(pictures / "000.png", broken)
    shutil.copy(pictures / "000.png", pictures / "new.png")
    assert extract_folder(pictures, backbone, out, batch_size=1) == {}
    assert_holds(FeatureStore(out), backbone, pictures, tolerance=1e-5)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.iterdir()}.items()


def test_a_store_of_other_feature_maps_is_refused_by_what_differs(
    pictures: Path, backbone: Backbone, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    extract_folder(pictures, backbone, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"is of other feature maps: layers is \[2, 0\], and \[2, 1\] is asked for\. "):
        extract_folder(pictures, tiny_backbone(layers=(2, 1)), out)
    with pytest.raises(ValueError, match=r"other feature maps: weights is \["):
        extract_folder(pictures, tiny_backbone(layers=(2, 0), seed=1), out)
    with pytest.raises(ValueError, match=r'other feature maps: dtype is "float32", and "bfloat16" is asked for'):
        extract_folder(pictures, backbone, out, dtype=torch.bfloat16)
    backbone.preprocessing = backbone.preprocessing.changed(mode="squash")
    with pytest.raises(ValueError, match=r"other feature maps: preprocessing is \{"):
        extract_folder(pictures, backbone, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_folders_that_are_no_store_are_left_alone(pictures: Path, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="has files and is no store; give a new or an empty folder"):
        extract_folder(pictures, backbone, pictures)
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        extract_folder(pictures, backbone, pictures / "000.png")
    with pytest.raises(FileNotFoundError, match="holds no store.json"):
        FeatureStore(pictures)
    with pytest.raises(FileNotFoundError, match="is no folder; give one with pictures"):
        extract_folder(tmp_path / "none", backbone, tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture; give a folder of files that end in"):
        extract_folder(tmp_path / "empty", backbone, tmp_path / "store")
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        extract_folder(pictures, backbone, tmp_path / "store", batch_size=0)
    assert not (tmp_path / "store").exists()


def test_damaged_stores_are_named(pictures: Path, backbone: Backbone, tmp_path: Path) -> None:
    out = tmp_path / "store"
    extract_folder(pictures, backbone, out)
    (shard,) = out.glob("shard-*")
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        len(FeatureStore(out))
    backbone(torch.zeros(1, 3, 32, 32)).save(shard)
    with pytest.raises(ValueError, match="is no shard of a store: it names no pictures"):
        len(FeatureStore(out))
    about = json.loads((out / "store.json").read_text())
    (out / "store.json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(ValueError, match="is of format 2, and this layerfuse reads 1"):
        FeatureStore(out)
    (out / "store.json").write_text("[]")
    with pytest.raises(ValueError, match="describes no store"):
        FeatureStore(out)


def test_the_command_says_that_weights_are_random_and_which_pictures_are_bad(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "bad.png").write_bytes(b"no picture")
    out = str(tmp_path / "store")
    command = ["extract", str(pictures), "--out", out, *OPTIONS, "--dtype", "bf16"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "WEIGHTS ARE RANDOM" in said.err and "8 of 8 pictures" in said.err
    assert "1 of 8 pictures cannot be read and were left out: bad.png\n" in said.err
    assert f"7 pictures in {out}, layers (1, 12)" in said.out
    assert main([*command, "--bad-images", "fail"]) == 2
    assert "1 of 8 pictures could not be read: bad.png. The others are in the store" in capsys.readouterr().err
    (pictures / "bad.png").unlink()
    assert main(command) == 0
    assert FeatureStore(out)["000.png"][0].dtype == torch.bfloat16
    assert main([*command, "--image-size", "1", "2", "3"]) == 2
    assert "give one edge, or height and width" in capsys.readouterr().err


def test_layers_may_be_shares_on_the_command_line(pictures: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "store")
    assert main(["extract", str(pictures), "--out", out, *OPTIONS, "--layers", "0.5", "-2"]) == 0
    assert FeatureStore(out)["000.png"].layers == (6, 11)
