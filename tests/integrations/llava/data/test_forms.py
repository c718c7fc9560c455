"""The same samples in every form: equal ids, labels and pixels, one doctor, copies, mixes, conversion."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.cli.data import main
from integrations.llava.data import (
    Collator,
    SampleMix,
    image_names,
    read_samples,
    sample_image_sizes,
    sample_lengths,
    source_of,
    usable_samples,
)
from integrations.llava.data import sidecar as sidecars
from integrations.llava.prompts import get_template
from tests.integrations.llava.data.forms_support import (
    FORMS,
    dataset,
    found,
    samples_about,
    write_hub_folder,
    write_table,
)
from tests.integrations.llava.tiny_parts import human_and_gpt

COUNT = 200


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("images")
    return samples_about(folder, COUNT), folder


@pytest.fixture(scope="module")
def written(originals: tuple[list[dict[str, Any]], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a form -> where it lies."""
    return {name: write(*originals, tmp_path_factory.mktemp(name)) for name, write in FORMS.items()}


# Equality


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches(
    originals: tuple[list[dict[str, Any]], Path], written: dict[str, Path], form: str, tmp_path: Path
) -> None:
    samples, images = originals
    folder = images if form in ("json", "messages") else tmp_path
    ours = dataset(read_samples(written[form]), folder)
    theirs = dataset(samples, images)

    assert len(ours) == COUNT
    assert source_of(ours.samples, 5) == written[form].name
    assert sample_lengths(ours.samples).tolist() == sample_lengths(samples).tolist()
    assert sample_image_sizes(ours.samples, folder, upright=False) == sample_image_sizes(samples, images, upright=False)
    assert not found(written[form], folder)
    for index in range(COUNT):
        own, other = ours[index], theirs[index]
        assert (own["id"], own["image_sizes"]) == (other["id"], other["image_sizes"])
        for key in ("input_ids", "labels", "pixel_values"):
            torch.testing.assert_close(own[key], other[key], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_read_in_other_processes(
    originals: tuple[list[dict[str, Any]], Path], written: dict[str, Path], form: str
) -> None:
    data = dataset(read_samples(written[form]), originals[1])
    copy = pickle.loads(pickle.dumps(data))

    assert copy.samples == data.samples
    torch.testing.assert_close(copy[7]["pixel_values"], data[7]["pixel_values"], rtol=0, atol=0)
    loader = torch.utils.data.DataLoader(data, batch_size=50, num_workers=2, collate_fn=Collator(0))
    assert [batch["sample_ids"][3] for batch in loader] == ["s3", "s53", "s103", "s153"]


@pytest.mark.parametrize("form", FORMS)
def test_an_edit_is_told_from_a_copy(tmp_path: Path, form: str) -> None:
    """By `raw`, which resuming compares: an answer, and a picture where it is inside; not the name of the file."""
    images = tmp_path / "images"
    images.mkdir()
    samples = samples_about(images, 6)
    raw = {}
    for kind in ("first", "copy", "answer", "picture"):
        if kind == "answer":
            samples[2]["conversations"][1]["value"] += "!"
        if kind == "picture":
            samples[2]["conversations"][1]["value"] = samples[2]["conversations"][1]["value"][:-1]
            Image.new("RGB", (64, 64)).save(images / "2.png")
        (tmp_path / kind).mkdir()
        read = read_samples(FORMS[form](samples, images, tmp_path / kind))
        raw[kind] = [read.raw(index) for index in range(len(read))]

    assert raw["first"] == raw["copy"] != raw["answer"]
    assert (raw["first"] == raw["picture"]) == (form in ("json", "messages", "folder"))


def test_what_is_found_about_a_large_file_is_kept(
    written: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sidecars, "_MIN_BYTES", 0)
    for form, kept in (("tar", "members-v1"), ("parquet", "images-v1"), ("folder", "rows-v1")):
        path = written[form] if form != "folder" else written[form] / "samples.csv"
        before = list(read_samples(written[form]))
        assert sidecars.sidecar_paths(path, kept)[0].is_file()
        assert list(read_samples(written[form])) == before
        assert read_samples(written[form]).lengths.tolist() == read_samples(written[form]).lengths.tolist()


# Mixes


def test_shares_are_drawn_by_seed_and_number_alone(written: dict[str, Path]) -> None:
    mixed = read_samples([f"{written['json']}:0.5", f"{written['parquet']}:1.25", written["tar"]])
    again = read_samples([written["tar"], f"{written['parquet']}:1.25", f"{written['json']}:0.50"])
    half = [sample["id"] for sample in read_samples(f"{written['json']}:0.5")]

    assert isinstance(mixed, SampleMix)
    assert mixed.counts == (
        "550 samples: 100 of data.json (0.5 × 200), 250 of data.parquet (1.25 × 200), 200 of data.tar"
    )
    ids = [sample["id"] for sample in mixed]
    assert ids[:100] == half and len({*half}) == 100 and half != [f"s{index}" for index in range(100)]
    assert half == sorted(half, key=lambda own: int(own[1:]))
    assert ids[100:300] == ids[350:] == [f"s{index}" for index in range(200)]
    assert ids[300:350] == [own for own in ids[300:350] if own in half]  # smaller shares are part of larger ones
    assert sorted(ids) == sorted(sample["id"] for sample in again)
    other = read_samples(f"{written['json']}:0.5", seed=1)
    assert [sample["id"] for sample in other] != half
    assert (mixed.place(0), mixed.place(349), mixed.place(350)) == (
        f"data.json, entry {int(half[0][1:]) + 1}",
        f"data.parquet, row {int(ids[349][1:]) + 1}",
        "data.tar, sample 1 (000000)",
    )
    copy = pickle.loads(pickle.dumps(mixed))
    assert copy == mixed and copy.counts == mixed.counts
    assert [source_of(copy, index) for index in (0, 100, 350)] == ["data.json", "data.parquet", "data.tar"]


@pytest.mark.parametrize(("share", "number"), [("0.5", 4), ("0.08", 1), ("2", 14), (".36", 3), ("1.5", 11), ("1.", 7)])
def test_a_share_is_rounded(tmp_path: Path, share: str, number: int) -> None:
    path = FORMS["json"](samples_about(tmp_path, 7), tmp_path, tmp_path)

    assert len(read_samples(f"{path}:{share}")) == number


def test_a_mix_trains_on_images_of_all_its_sources(
    originals: tuple[list[dict[str, Any]], Path], written: dict[str, Path]
) -> None:
    samples, images = originals
    mixed = read_samples([f"{written[form]}:0.02" for form in FORMS])
    usable, _ = usable_samples(mixed, image_folder=images, template=get_template("v1"), check_images="decode")
    data, plain = dataset(usable, images), dataset(samples, images)

    assert len(data) == 4 * len(FORMS) and not mixed.images_inside
    for item in data:
        torch.testing.assert_close(item["pixel_values"], plain[int(item["id"][1:])]["pixel_values"], rtol=0, atol=0)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9), name.replace("a", "red").replace("b", "blue")).save(images / "0.png")
        sample = {"id": name, "image": "0.png", "conversations": human_and_gpt("<image>\nWhat?", "A.")}
        FORMS["parquet"]([sample], images, tmp_path / name)
    mixed = read_samples([tmp_path / "a" / "data.parquet", tmp_path / "b" / "data.parquet"])
    data = dataset(mixed, tmp_path)

    assert [source_of(mixed, index) for index in range(2)] == ["a/data.parquet", "b/data.parquet"]
    assert [image_names(sample) for sample in mixed] == [("a/data.parquet/0-0",), ("b/data.parquet/0-0",)]
    assert not torch.equal(data[0]["pixel_values"], data[1]["pixel_values"])


def test_one_pattern_over_folders_tells_files_of_one_name_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9), name.replace("a", "red").replace("b", "blue")).save(tmp_path / name / "0.png")
        sample = {"id": name, "image": "0.png", "conversations": human_and_gpt("<image>\nWhat?", "A.")}
        FORMS["parquet"]([sample], tmp_path / name, tmp_path / name)
    joined = read_samples(str(tmp_path / "*" / "data.parquet"))
    data = dataset(joined, tmp_path)

    assert [joined.place(index) for index in range(2)] == [
        f"data.parquet/{name}/data.parquet, row 1" for name in ("a", "b")
    ]
    for index, name in enumerate(("a", "b")):
        own = dataset(read_samples(tmp_path / name / "data.parquet"), tmp_path)[0]
        torch.testing.assert_close(data[index]["pixel_values"], own["pixel_values"], rtol=0, atol=0)


def test_a_folder_of_samples_hides_no_images_of_a_folder_that_is_called_as_it_is(tmp_path: Path) -> None:
    for name, color in (("pictures/coco", "red"), ("own/coco/images", "blue")):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), color).save(tmp_path / name / "0.png")
    turns = human_and_gpt("<image>\nWhat?", "A.")
    for file, image in (("mix.json", "coco/0.png"), ("own/coco/samples.json", "0.png")):
        (tmp_path / file).write_text(json.dumps([{"id": file, "image": image, "conversations": turns}]))
    data = dataset(read_samples([tmp_path / "mix.json", tmp_path / "own" / "coco"]), tmp_path / "pictures")

    for item, file in zip(data, ("pictures/coco/0.png", "own/coco/images/0.png"), strict=True):
        torch.testing.assert_close(item["pixel_values"], data.pixels(str(tmp_path / file))[0], rtol=0, atol=0)


def test_a_link_is_called_by_its_own_name(tmp_path: Path) -> None:
    samples = samples_about(tmp_path, 4)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        FORMS["json"](samples, tmp_path, tmp_path / name).rename(tmp_path / name / "blob")
        (tmp_path / f"{name}.json").symlink_to(tmp_path / name / "blob")
    mixed = read_samples([tmp_path / "one.json", tmp_path / "two.json"])

    assert [source_of(mixed, index) for index in (0, 4)] == ["one.json", "two.json"]


def test_images_inside_are_looked_at_whatever_the_image_folder(tmp_path: Path) -> None:
    samples = samples_about(tmp_path, 4)
    (tmp_path / "2.png").write_bytes(b"")
    path = FORMS["parquet"](samples, tmp_path, tmp_path)

    with pytest.raises(ValueError, match="zero bytes"):
        usable_samples(read_samples(path), image_folder=tmp_path / "nowhere", template=get_template("v1"))


def test_a_path_that_exists_is_no_share(tmp_path: Path) -> None:
    path = FORMS["json"](samples_about(tmp_path, 4), tmp_path, tmp_path)
    path.rename(tmp_path / "a.json:0.5")

    assert len(read_samples(tmp_path / "a.json:0.5")) == 4
    assert len(read_samples(f"{tmp_path}/a.json:0.5:0.5")) == 2
    with pytest.raises(FileNotFoundError, match=r"data file C:\\a.json does not exist"):
        read_samples(r"C:\a.json")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "no data are given; give a json, jsonl"),
        (["a.json", "./a.json:0.5"], "name a file twice; give one share of it"),
        (["a.json:0.01"], "a share of 0.01 of a.json is none of its 4 samples; give a larger one"),
        (["a.json:0"], "a share of 0 of a.json is none of its 4 samples"),
        ("https://x.org/a.tar", "is a stream, of which no sample can be found by its number; download it"),
        ("pipe:cat a.tar", "is a stream"),
        ("-", "is a stream"),
    ],
)
def test_what_cannot_be_mixed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: Any, message: str
) -> None:
    FORMS["json"](samples_about(tmp_path, 4), tmp_path, tmp_path).rename(tmp_path / "a.json")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match=message):
        read_samples(paths)


# Conversion


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_converted_into_llavas(
    originals: tuple[list[dict[str, Any]], Path],
    written: dict[str, Path],
    form: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples, images = originals
    folder = ["--image-folder", str(images)] if form in ("json", "messages") else []

    assert main(["convert", f"{written[form]}:0.1", str(tmp_path / "out"), *folder]) == 0
    assert "20 samples, 20 images: " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        original = samples[int(row["id"][1:])]
        assert row == original | {"image": row["image"]}
        assert (tmp_path / "out" / "images" / row["image"]).read_bytes() == (images / original["image"]).read_bytes()
        assert Path(row["image"]).suffix == Path(original["image"]).suffix
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"samples.jsonl", "images"}
    # What was written is a form of its own, and LLaVA's file with its image folder.
    assert not found(tmp_path / "out", tmp_path)
    assert not found(tmp_path / "out" / "samples.jsonl", tmp_path / "out" / "images")
    with pytest.raises(SystemExit):
        main(["convert", str(written[form]), str(tmp_path / "out"), *folder])
    assert "out exists and is left alone" in capsys.readouterr().err


def test_a_conversion_leaves_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    samples = samples_about(images, 4)
    (images / "2.png").write_bytes(b"")
    path = FORMS["tar"](samples, images, tmp_path)
    before = sorted(tmp_path.iterdir())

    assert main(["convert", str(path), str(tmp_path / "out")]) == 1
    assert "sample s2: image data.tar/000002.png: corrupt, zero bytes" in capsys.readouterr().err
    assert main(["convert", str(path)]) == 1
    assert "give the data and a new folder: data convert SOURCE… OUT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(path), str(path / "out"), "--bad-samples", "skip"])
    assert "out cannot be written" in capsys.readouterr().err

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.rename", fail)
        with pytest.raises(OSError, match="No space left"):
            main(["convert", str(path), str(tmp_path / "out"), "--bad-samples", "skip"])
    assert sorted(tmp_path.iterdir()) == before
    assert main(["convert", str(path), str(tmp_path / "out"), "--bad-samples", "skip"]) == 0
    assert "3 samples, 1 left out, 3 images: " in capsys.readouterr().out


# The doctor's command


def test_the_doctor_checks_mixes_and_says_what_fix_cannot_do(
    written: dict[str, Path], originals: tuple[list[dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tar, table = str(written["tar"]), str(written["parquet"])

    assert main(["check", "--data", tar, f"{table}:0.5"]) == 0
    said = capsys.readouterr().out
    assert "data.tar     " in said and "300 of 300 samples can be used" in said
    assert "data.parquet, row" in said and "has the id of data.tar, sample" in said
    assert main(["check", "--data", f"{tar}:2.5"]) == 0
    assert "500 samples, nothing found" in capsys.readouterr().out  # what comes twice is no second use of an id
    assert main(["check", "--data", tar, "--fix"]) == 1
    assert "--fix writes one json or jsonl file anew, and" in (said := capsys.readouterr().err)
    assert f"data convert {tar} OUT --bad-samples skip" in said
    with pytest.raises(SystemExit):
        main(["check", "--data", str(written["json"])])
    assert "image names are relative to a folder, which is missing; give --image-folder" in capsys.readouterr().err
    assert main(["check", "--data", tar, "--template", "plain"]) == 0
    with pytest.raises(SystemExit):
        main(["check", "--data", tar, "--image-folder", "nowhere"])


def test_a_table_without_images_needs_the_image_folder(tmp_path: Path) -> None:
    """Columns with names, or with Hugging Face's images of which only the paths are there."""
    samples = samples_about(tmp_path, 4)
    for cell in (lambda name: name, lambda name: {"bytes": None, "path": name}):
        rows = [{**sample, "image": cell(sample["image"])} for sample in samples]
        for path in (
            write_table(rows, tmp_path / "a.parquet"),
            write_hub_folder(rows, tmp_path / f"hub{len(str(cell('')))}"),
        ):
            read = read_samples(path)
            assert list(read) == samples and not read.images_inside
            assert not found(path, tmp_path)


@pytest.mark.parametrize("cell", [bytes, lambda content: {"bytes": content, "path": None}])
@pytest.mark.parametrize("group", [1, 3])
def test_cells_may_hold_several_images_or_none(tmp_path: Path, cell: Any, group: int) -> None:
    samples_about(tmp_path, 3)
    pictures = [cell((tmp_path / name).read_bytes()) for name in ("0.png", "1.jpg", "2.png")]
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    rows = [{"images": own, "messages": turns} for own in (pictures, [], None, pictures[1:2])]
    paths = [write_table(rows, tmp_path / "a.parquet", row_group_size=group), write_hub_folder(rows, tmp_path / "hub")]

    for path in paths:
        samples = read_samples(path)
        assert [len(image_names(sample)) for sample in samples] == [3, 0, 0, 1]
        assert not found(path, tmp_path)
        item = dataset(samples, tmp_path)[0]
        assert list(item["image_sizes"]) == [(8, 9), (9, 10), (10, 11)]
    assert samples[0]["conversations"][0]["value"] == "<image>\n<image>\n<image>\nWhat?"
