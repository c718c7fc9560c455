"""Commands that look at pictures: what they write, and what they refuse before any work."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import layerfuse
from layerfuse.cli import _labelling, main, similarity
from layerfuse.cli._encoders import pictures_as_seen
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


@pytest.mark.parametrize(
    ("fuser", "resample", "kinds"),
    [("average", "bilinear", {"maps"}), ("mmfuser", None, {"maps", "points"}), ("depth_attention", "nearest", None)],
)
def test_maps_of_several_backbones_are_drawn_over_what_each_of_them_sees(
    fuser: str, resample: str | None, kinds: set[str] | None, tmp_path: Path
) -> None:
    pair = layerfuse.create_encoder(
        [BACKBONE, BACKBONE], layers=[(1, 3), (2,)], image_size=[96, 64], fuser=fuser, resample=resample
    )
    pair.save_pretrained(tmp_path / "encoder")
    folder = write_pictures(tmp_path / "photos", 1)
    assert main(["maps", str(tmp_path / "encoder"), str(folder), "--output", str(tmp_path / "out")]) == 0
    drawn = {path.stem.split("-")[-1] for path in (tmp_path / "out").glob("*.png")}
    assert drawn == (kinds or {"maps", "depth"})
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert (told["layers"], told["sources"]) == ([1, 3, 2], [0, 0, 1])
    assert told["grids"] == [[12, 12], [12, 12], [12, 12] if resample else [8, 8]]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Backbone 2, a CLIPVisionModel: Layers 2 on a grid of" in page


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        (BACKBONE, "layer of backbone"),
        ("timm:vit_tiny_patch16_224", "layer of vit_tiny_patch16_224"),
        ("open_clip:ViT-B-16/openai", "layer of ViT-B-16/openai"),  # whose end says nothing
        ("transformers:google/siglip-base-patch16-224", "layer of google/siglip-base-patch16-224"),
    ],
)
def test_an_axis_names_the_model(model: str, shown: str) -> None:
    assert similarity._axis(model) == shown


def test_layers_of_an_encoders_backbones_are_compared(tmp_path: Path) -> None:
    pair = layerfuse.create_encoder(
        [BACKBONE, BACKBONE], layers=[(1, 3), (3,)], image_size=[64, 32], fuser="mmfuser", resample=None
    )
    pair.save_pretrained(tmp_path / "encoder")
    folder = write_pictures(tmp_path / "photos", 2)
    assert main(["similarity", str(tmp_path / "encoder"), str(folder), "--output", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert told["rows"] == told["columns"] == ["1: 1", "1: 3", "2: 3"]
    assert told["tokens"] == 2 * 64
    assert 0.2 < told["cka"][1][2] < 0.99 and told["cosine"][2][2] == pytest.approx(1)


def test_each_backbone_of_several_has_its_own_picture(tmp_path: Path) -> None:
    pair = layerfuse.create_encoder([BACKBONE, BACKBONE], layers=[(1,), (2,)], image_size=[96, 64], fuser="average")
    with Image.open(write_pictures(tmp_path, 1) / "0.png") as picture:
        large, small = pictures_as_seen(pair.prepare(picture), pair.backbone)[0]
        shown = np.asarray(picture.convert("RGB")).astype(int)
    assert (large.shape, small.shape) == ((96, 96, 3), (64, 64, 3))
    assert abs(small.astype(int) - shown).max() <= 1
    assert abs(large.reshape(32, 3, 32, 3, 3).mean((1, 3)) - shown.reshape(32, 2, 32, 2, 3).mean((1, 3))).mean() < 3


@pytest.mark.parametrize("command", ["maps", "contributions"])
@pytest.mark.parametrize("config", [None, "{", "[]", '{"model_type": "llava"}'])
def test_a_folder_that_holds_no_encoder_says_what_to_give(
    command: str, config: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = write_pictures(tmp_path / "photos", 1), tmp_path / "model"
    model.mkdir()
    if config is not None:
        (model / "config.json").write_text(config)
    assert main([command, str(model), str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "holds no encoder that save_pretrained wrote (config.json with 'backbone'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["maps", "contributions", "similarity"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "photos", 1)
    assert main([command, "encodr", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "there is no folder encodr; give that of a trained encoder, or a backbone" in capsys.readouterr().err


def test_contributions_are_printed_drawn_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = layerfuse.create_encoder(BACKBONE, layers=(1, 3, -1), fuser="depth_attention")
    with torch.no_grad():
        encoder.fuser.key_bias[1] = 100.0  # type: ignore[index, operator]
    encoder.save_pretrained(tmp_path / "encoder")
    folder = write_pictures(tmp_path / "photos", 3)
    arguments = ("contributions", str(tmp_path / "encoder"), str(folder), "--batch-size", "2")
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert re.search(r"layer 3 +100.0% +100.0%", capsys.readouterr().out)
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert told["moved"] == pytest.approx([0, 1, 0], abs=1e-6)
    assert told["own_shares"] == pytest.approx([0, 1, 0], abs=1e-6)
    assert (told["layers"], told["fuser"], told["replaced_with"]) == ([1, 3, 6], "depth_attention", "mean")
    assert len(list((tmp_path / "out").glob("00?-*-moved.png"))) == len(list((tmp_path / "out").glob("*-own.png"))) == 3
    page = (tmp_path / "out" / "index.html").read_text()
    assert "as it was trained" in page and "replaced by its mean" in page


def test_contributions_of_a_fuser_without_weights_of_its_own_and_without_a_grid(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "photos", 2)
    arguments = ("contributions", BACKBONE, str(folder), "--layers", "1", "-1", "--replace-with", "zeros")
    assert main([*arguments, "--fuser", "token_concat", "--output", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert "alone is replaced by zeros, as a share" in (tmp_path / "out" / "index.html").read_text()
    assert told["own_shares"] is None
    assert sum(share**2 for share in told["moved"]) == pytest.approx(1)  # tokens beside each other


@pytest.mark.parametrize(
    ("rest", "says"),
    [((), "is a backbone alone; give the folder of a trained encoder"), (("--fuser", "text_gated"), "condition")],
)
def test_what_contributions_cannot_measure_is_told(
    rest: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "photos", 1)
    assert main(["contributions", BACKBONE, str(folder), *rest, "--output", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", ["similarity", "maps", "contributions", "probe", "suggest"])
def test_an_output_that_is_a_file_is_told_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "photos", 1)
    (tmp_path / "out").write_text("mine")
    assert main([command, "timm:none", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("command", ["similarity", "maps", "contributions", "probe", "suggest"])
def test_an_output_that_takes_no_files_is_told_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "photos", 1)
    assert main([command, "timm:none", str(folder), "--output", str(folder / "0.png" / "out")]) == 2
    assert "takes no files (Not a directory); give another folder" in capsys.readouterr().err


def test_a_layer_that_is_no_number_and_a_gpu_that_is_not_there_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("maps", BACKBONE, str(write_pictures(tmp_path / "photos", 1)), "--output", str(tmp_path / "out"))
    with pytest.raises(SystemExit):
        main([*arguments, "--layers", "last"])
    assert "'last' is no layer; give numbers" in capsys.readouterr().err
    gpu = f"cuda:{torch.cuda.device_count()}"
    assert main([*arguments, "--device", gpu]) == 2
    assert f"--device {gpu}: torch finds {torch.cuda.device_count()} GPUs" in capsys.readouterr().err


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


@pytest.mark.parametrize("command", ["similarity", "maps", "contributions", "probe", "suggest"])
def test_an_unreadable_picture_is_left_out_and_named_or_ends_the_command(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = 7 if command in ("probe", "suggest") else 3  # probes need some to learn from and some to test on
    folder = write_pictures(tmp_path / "photos", total)
    _damage(folder / "2.png")
    arguments = (command, BACKBONE, str(folder), "--batch-size", "2", "--output", str(tmp_path / "out"))
    arguments += ("--fuser", "average") if command == "contributions" else ()
    assert main(arguments) == 0
    assert f"1 of {total} pictures cannot be read and were left out: {folder / '2.png'}" in capsys.readouterr().err
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert list(told["left_out"]) == [str(folder / "2.png")]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "cannot be read: " in page
    assert command in ("maps", "contributions") or f"{total - 1} pictures" in page
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


@pytest.mark.parametrize("command", ["probe", "probe --patch-labels", "suggest", "similarity"])
def test_a_picture_that_is_left_out_late_does_not_change_how_many_cells_of_the_others_are_taken(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_labelling, similarity):
        monkeypatch.setattr(module, "_TOKENS", 60)
    folder, masks = write_pictures(tmp_path / "photos", 7), tmp_path / "masks"
    masks.mkdir()
    for name in range(7):
        Image.fromarray(np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2), np.ones((32, 32), np.uint8))).save(
            masks / f"{name}.png"
        )
    _damage(folder / "4.png")
    arguments = [BACKBONE, str(folder), "--batch-size", "2", "--output", str(tmp_path / "out")]
    arguments += ["--patch-labels", str(masks)] if command.endswith("--patch-labels") else []
    arguments += ["--with", BACKBONE] if command == "similarity" else []
    assert main([command.split()[0], *arguments]) == 0
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert len(told["left_out"]) == 1
    if command == "similarity":
        assert told["tokens"] == 6 * (60 // 7)
        assert [row[i] for i, row in enumerate(told["cka"])] == pytest.approx([1] * 7)


def test_nothing_but_unreadable_pictures_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_pictures(tmp_path / "photos", 2)
    for path in folder.iterdir():
        _damage(path)
    assert main(["maps", BACKBONE, str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "none of 2 pictures can be read. The first: picture " in capsys.readouterr().err


def test_a_page_says_which_layers_lie_on_which_grid(tmp_path: Path) -> None:
    folder, out = write_pictures(tmp_path / "photos", 1), tmp_path / "out"
    arguments = ("--pretrained", "false", "--layers", "1", "6", "7", "-1", "--output", str(out))
    assert main(["maps", "timm:swin_tiny_patch4_window7_224", str(folder), *arguments]) == 0
    shown = "Layers 1 on a grid of 56×56; 6, 7 on a grid of 14×14; 12 on a grid of 7×7."
    assert shown in (out / "index.html").read_text()


def test_maps_of_a_shallow_backbone_are_of_the_layers_that_it_has(tmp_path: Path) -> None:
    folder, out = write_pictures(tmp_path / "photos", 1), tmp_path / "out"
    assert main(["maps", BACKBONE, str(folder), "--output", str(out)]) == 0
    assert json.loads((out / "numbers.json").read_text())["layers"] == [1, 2, 3, 4, 5]
