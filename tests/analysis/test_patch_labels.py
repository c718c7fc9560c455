"""Probes of patch labels on the command line: label images, and letters."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerfuse import create_backbone
from layerfuse.cli import _labelling, main
from tests.analysis.looking_support import BACKBONE, write_pictures


def _planted(folder: Path, count: int) -> tuple[Path, Path]:
    """Write pictures with a bright and a striped part on dark noise, and their label images: 0, 3, 9 and 255."""
    pictures, masks, noise = folder / "photos", folder / "masks", np.random.default_rng(0)
    (masks / "some").mkdir(parents=True)
    (pictures / "some").mkdir(parents=True)
    for index in range(count):
        pixels = noise.integers(0, 60, (64, 96, 3), dtype=np.uint8)
        classes = np.zeros((64, 96), dtype=np.uint8)
        left, right = noise.integers(0, 4, 2) * 8
        classes[16:48, 16 + left : 40 + left], classes[:24, 48 + right : 72 + right] = 3, 9
        classes[:, :16] = 255
        pixels[classes == 3] += 160
        pixels[(classes == 9) & (np.arange(96) % 4 < 2)] += 160
        Image.fromarray(pixels).save(pictures / "some" / f"{index}.jpg", quality=95)
        Image.fromarray(classes).save(masks / "some" / f"{index}.png")
    return pictures, masks


def test_planted_classes_of_label_images_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, masks = _planted(tmp_path, 10)
    arguments = (BACKBONE, str(pictures), "--patch-labels", str(masks), "--output", str(tmp_path / "out"))
    assert main(["probe", *arguments]) == 0
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert told["classes"] == ["0", "3", "9"]
    assert 0.5 < told["chance"] < 0.75  # 3 and 9 take a good third of the crop
    # The embeddings have the brightness; from the first block on, stripes are told from it as well.
    assert told["accuracy"]["1"] > 0.95 > told["chance"] + 0.15
    assert main(["suggest", *arguments]) == 0
    assert "layer" in capsys.readouterr().out


def test_classes_that_stand_in_other_cells_than_they_say_are_not_read(tmp_path: Path) -> None:
    pictures, masks = _planted(tmp_path, 10)
    for index, path in enumerate(sorted(masks.rglob("*.png"))):
        with Image.open(path) as mask:
            moved = np.roll(np.asarray(mask), (24, 8 * index), axis=(0, 1))
        Image.fromarray(moved).save(path)
    arguments = (BACKBONE, str(pictures), "--patch-labels", str(masks), "--output", str(tmp_path / "out"))
    assert main(["probe", *arguments]) == 0
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert max(told["accuracy"].values()) < told["chance"] + 0.15


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("missing", "1 of 6 pictures have no label image in .*: some/2.jpg. Give one of the same name"),
        ("size", r"the label image .*2.png has 32×32 pixels, and its picture .* has 64×96; give one"),
        ("colours", r"2.png: the label image has mode 'RGB'; class numbers are"),
        ("damaged", r"the label image .*2.png cannot be read \("),
        ("ignored", r"label images have 0 classes that more than one picture shows \(0 in all\)"),
    ],
)
def test_label_images_that_cannot_be_used_are_named(
    harm: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, masks = _planted(tmp_path, 6)
    mask = masks / "some" / "2.png"
    if harm == "missing":
        mask.unlink()
    elif harm == "damaged":
        mask.write_bytes(mask.read_bytes()[:50])
    elif harm == "ignored":
        for path in masks.rglob("*.png"):
            Image.new("L", (96, 64), 255).save(path)
    else:
        Image.new(*{"size": ("L", (32, 32)), "colours": ("RGB", (96, 64))}[harm]).save(mask)
    arguments = (BACKBONE, str(pictures), "--patch-labels", str(masks), "--output", str(tmp_path / "out"))
    assert main(["probe", *arguments]) == 2
    told = capsys.readouterr().err
    assert re.search(says, told), told


def test_classes_of_one_picture_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, masks = _planted(tmp_path, 6)
    with Image.open(masks / "some" / "2.png") as mask:
        alone = np.asarray(mask).copy()
    alone[40:, :] = 77
    Image.fromarray(alone).save(masks / "some" / "2.png")
    arguments = (BACKBONE, str(pictures), "--patch-labels", str(masks), "--output", str(tmp_path / "out"))
    assert main(["probe", *arguments]) == 0
    assert "only one picture shows are left out: 77" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "numbers.json").read_text())["classes"] == ["0", "3", "9"]


@pytest.mark.parametrize("command", ["probe", "suggest"])
def test_letters_of_each_height_are_probed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_labelling, "_LETTERS", 60)
    folder = write_pictures(tmp_path / "photos", 6)
    (folder / "2.png").write_bytes(b"")
    arguments = (BACKBONE, str(folder), "--text", "--letter-heights", "12", "6", "--output", str(tmp_path / "out"))
    assert main([command, *arguments]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Which of the letters AEHKNRSX stands in a patch" in page and "6, 12 pixels high" in page
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert list(told["left_out"]) == [str(folder / "2.png")]
    if command == "probe":
        assert told["heights"] == [6, 12] and told["classes"] == list("AEHKNRSX")
        assert {len(rights) for rights in told["accuracy"].values()} == {2}
        assert all(0.1 < chance < 0.4 for chance in told["chance"].values())
        assert "50 letters of each height" in capsys.readouterr().out


def test_progress_counts_letters_over_all_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_labelling, "_LETTERS", 60)
    folder = write_pictures(tmp_path / "photos", 6)
    (folder / "5.png").write_bytes(b"")
    arguments = ("--text", "--letter-heights", "12", "--batch-size", "2", "--output", str(tmp_path / "out"))
    assert main(["probe", BACKBONE, str(folder), *arguments]) == 0
    told = [line.strip() for line in capsys.readouterr().err.splitlines() if "letters" in line or "of 6" in line]
    assert told[0].startswith("1 of 6 pictures cannot be read")
    assert told[1:] == ["50 of 50 letters of 12 pixels"]


@pytest.mark.parametrize("kind", [(), ("--text",)])
def test_too_few_pictures_are_told_before_the_model_is_built(
    kind: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "photos", 4)
    assert main(["suggest", "timm:none", str(folder), *kind, "--output", str(tmp_path / "out")]) == 2
    assert "holds 4 pictures; probes learn from some" in capsys.readouterr().err


def test_heights_without_letters_and_letters_without_room_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "photos", 6)
    arguments = ("probe", BACKBONE, str(folder), "--output", str(tmp_path / "out"), "--letter-heights", "80")
    assert main(arguments) == 2
    assert "written with --text; give that, too" in capsys.readouterr().err
    assert main([*arguments, "--text"]) == 2
    assert "a word of letters of 80 pixels has no room" in capsys.readouterr().err


def test_cells_beyond_a_padded_picture_have_no_edge_label(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(noise.integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    backbone = create_backbone("timm:vit_tiny_patch16_224", layers=(0, 1), pretrained=False, image_size=64)
    backbone.preprocessing = backbone.preprocessing.changed(mode="pad")
    given = {"labels": False, "patch_labels": None, "text": False, "letter_heights": None}
    arguments = argparse.Namespace(folder=str(tmp_path), batch_size=2, bad_images="skip", **given)
    read = _labelling.labelling(arguments).read(backbone)
    assert (read.labels.view(5, 4, 4)[:, [0, 3]] == -1).all()
    assert set(read.labels.view(5, 4, 4)[:, 1:3].flatten().tolist()) == {0, 1}
