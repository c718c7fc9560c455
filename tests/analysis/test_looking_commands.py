"""Commands that look at pictures: what they write, and what they refuse before any work."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import layerfuse
from layerfuse.cli import main
from tests.analysis.looking_support import BACKBONE, write_pictures


def test_similarity_writes_picture_numbers_and_page(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "photos", 3)
    assert main(["similarity", BACKBONE, str(folder), "--output", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert told["rows"] == told["columns"] == [0, 1, 2, 3, 4, 5, 6]
    assert told["tokens"] == 3 * 64
    for measure in ("cosine", "cka"):
        assert [row[i] for i, row in enumerate(told[measure])] == pytest.approx([1] * 7)
        assert told[measure][0][6] < told[measure][5][6]  # neighbours are nearer than the ends
    page = (tmp_path / "out" / "index.html").read_text()
    assert "data:image/png;base64," in page and "RANDOM" not in page
    with Image.open(tmp_path / "out" / "similarity.png") as drawn:
        assert drawn.width > 400


def test_two_backbones_are_compared_by_cka_alone_and_random_weights_are_said(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "photos", 2)
    pair = (BACKBONE, str(folder), "--with", "timm:vit_tiny_patch16_224", "--image-size", "64")
    assert main(["similarity", *pair, "--pretrained", "false", "--output", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert "cosine" not in told
    assert (len(told["cka"]), len(told["cka"][0])) == (7, 13)
    assert any("fewer than two tokens" in note for note in told["notes"])
    assert "WEIGHTS ARE RANDOM" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "neither a picture nor a folder"),
        (("{}", "--image-size", "1", "2", "3"), "give one edge, or height and width"),
        (("{}", "--batch-size", "0"), "--batch-size is 0; give at least 1"),
    ],
)
def test_bad_input_of_similarity_is_told_in_one_line(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path, 1)
    assert (
        main(["similarity", BACKBONE, "--output", str(tmp_path / "out"), *(text.format(folder) for text in arguments)])
        == 2
    )
    assert says in capsys.readouterr().err


def test_a_missing_matplotlib_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["similarity", BACKBONE, str(folder), "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert "pip install 'layerfuse[viz]'" in capsys.readouterr().err


def test_suggest_and_probe_take_folders_for_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (name, brightness) in enumerate({"dark": 0, "light": 120}.items()):
        write_pictures(tmp_path / "photos" / name, 8, brightness=brightness, seed=seed)
    arguments = (BACKBONE, str(tmp_path / "photos"), "--labels", "--output", str(tmp_path / "out"))
    assert main(["probe", *arguments]) == 0
    assert "layer   right" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert told["classes"] == ["dark", "light"]
    assert list(told["accuracy"]) == ["0", "1", "2", "3", "4", "5", "6"]
    assert min(told["accuracy"].values()) > 0.9  # brightness is there in all of them, so that
    assert main(["suggest", *arguments]) == 0
    assert "cannot tell" in capsys.readouterr().out
    assert "cannot tell" in (tmp_path / "out" / "index.html").read_text()


def test_suggest_without_labels_reads_edges(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "photos", 6)
    assert main(["suggest", BACKBONE, str(folder), "--output", str(tmp_path / "out")]) == 0
    assert "more edge than half of all patches" in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out" / "suggestion.png").stat().st_size > 1000


def test_labels_need_two_folders_and_nothing_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "one", 1)
    assert main(["probe", BACKBONE, str(tmp_path), "--labels", "--output", str(tmp_path / "out")]) == 2
    assert "1 folder with pictures was found" in capsys.readouterr().err
    write_pictures(tmp_path, 1)
    assert main(["probe", BACKBONE, str(tmp_path), "--labels", "--output", str(tmp_path / "out")]) == 2
    assert "stands beside them" in capsys.readouterr().err


def test_maps_draws_a_sheet_for_each_picture_and_a_new_fuser_is_called_new(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "photos", 3)
    arguments = (BACKBONE, str(folder), "--layers", "1", "0.5", "-1", "--fuser", "average", "--batch-size", "2")
    assert main(["maps", *arguments, "--output", str(tmp_path / "out")]) == 0
    sheets = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert sheets == ["000-0-maps.png", "001-1-maps.png", "002-2-maps.png"]
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert (told["layers"], told["fuser"]) == ([1, 3, 6], "average")
    assert "is new: what it makes of the maps was not learned" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(("fuser", "sheet"), [("mmfuser", "points"), ("depth_attention", "depth")])
def test_maps_of_a_trained_encoder_show_what_its_fuser_reads(fuser: str, sheet: str, tmp_path: Path) -> None:
    encoder = layerfuse.create_encoder(BACKBONE, layers=(1, 3, -1), fuser=fuser)
    encoder.save_pretrained(tmp_path / "encoder")
    folder = write_pictures(tmp_path / "photos", 1)
    arguments = ("maps", str(tmp_path / "encoder"), str(folder), "--reduction", "norm")
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"000-0-maps.png", f"000-0-{sheet}.png"}
    assert "as it was trained" in (tmp_path / "out" / "index.html").read_text()


def test_a_trained_encoder_keeps_its_layers_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layerfuse.create_encoder(BACKBONE, layers=(1, -1), fuser="average").save_pretrained(tmp_path / "encoder")
    folder = write_pictures(tmp_path / "photos", 1)
    arguments = ("maps", str(tmp_path / "encoder"), str(folder), "--output", str(tmp_path / "out"))
    assert main([*arguments, "--layers", "1", "--image-size", "96"]) == 2
    assert "leave --layers, --image-size out" in capsys.readouterr().err
    assert main([*arguments, "--pretrained", "false"]) == 2
    assert "leave --pretrained false out" in capsys.readouterr().err


def test_maps_of_several_backbones_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = layerfuse.create_encoder([BACKBONE, BACKBONE], layers=[(1,), (2,)], fuser="average", resample="bilinear")
    pair.save_pretrained(tmp_path / "encoder")
    folder = write_pictures(tmp_path / "photos", 1)
    assert main(["maps", str(tmp_path / "encoder"), str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "has several backbones" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["similarity", "maps", "probe", "suggest"])
def test_an_output_that_is_a_file_is_told_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "photos", 1)
    (tmp_path / "out").write_text("mine")
    assert main([command, "timm:none", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_model_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = write_pictures(tmp_path / "photos", 1), tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(Path(BACKBONE.removeprefix("transformers:")) / name, model)
    arguments = ("similarity", f"transformers:{model}", str(folder), "--output", str(tmp_path / "out"))
    assert main(arguments) == 2
    assert "finds no weights" in capsys.readouterr().err
    assert main([*arguments, "--pretrained", "false"]) == 0
    assert json.loads((tmp_path / "out" / "numbers.json").read_text())["pretrained"] is False


def _damage(picture: Path) -> None:
    picture.write_bytes(picture.read_bytes()[:60])


@pytest.mark.parametrize("command", ["similarity", "maps", "probe", "suggest"])
def test_an_unreadable_picture_is_left_out_and_named_or_ends_the_command(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "photos", 7)
    _damage(folder / "2.png")
    arguments = (command, BACKBONE, str(folder), "--batch-size", "2", "--output", str(tmp_path / "out"))
    assert main(arguments) == 0
    assert f"1 of 7 pictures cannot be read and were left out: {folder / '2.png'}" in capsys.readouterr().err
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert list(told["left_out"]) == [str(folder / "2.png")]
    assert "cannot be read: " in (tmp_path / "out" / "index.html").read_text()
    assert main([*arguments, "--bad-images", "fail"]) == 2
    assert "2.png cannot be read (" in capsys.readouterr().err


def test_labels_stay_with_their_pictures_where_some_are_left_out(tmp_path: Path) -> None:
    for seed, (name, brightness) in enumerate({"dark": 0, "light": 120}.items()):
        write_pictures(tmp_path / "photos" / name, 8, brightness=brightness, seed=seed)
    for index in (0, 3):
        _damage(tmp_path / "photos" / "dark" / f"{index}.png")
    arguments = (BACKBONE, str(tmp_path / "photos"), "--labels", "--output", str(tmp_path / "out"))
    assert main(["probe", *arguments, "--batch-size", "3"]) == 0
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert min(told["accuracy"].values()) > 0.9 and told["chance"] == pytest.approx(8 / 14)


def test_nothing_but_unreadable_pictures_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_pictures(tmp_path / "photos", 2)
    for path in folder.iterdir():
        _damage(path)
    assert main(["maps", BACKBONE, str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "none of 2 pictures can be read. The first: picture " in capsys.readouterr().err


def test_maps_of_a_shallow_backbone_are_of_the_layers_that_it_has(tmp_path: Path) -> None:
    folder, out = write_pictures(tmp_path / "photos", 1), tmp_path / "out"
    assert main(["maps", BACKBONE, str(folder), "--output", str(out)]) == 0
    assert json.loads((out / "numbers.json").read_text())["layers"] == [1, 2, 3, 4, 5]
