"""Images that a sample names in other ways; pictures of every mode and format, and one verdict on each."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from integrations.llava._text import printable
from integrations.llava.cli.data import main
from integrations.llava.data import BadSampleError, ConversationDataset, read_samples, survey_samples
from integrations.llava.data.doctor.images import find_broken_images
from integrations.llava.data.images import UnreadableImageError, read_image
from integrations.llava.image_layout import FixedLayout
from integrations.llava.prompts import TEMPLATES, TextEncoder
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from tests.integrations.llava.tiny_parts import human_and_gpt, make_tokenizer

PREPARE = Preprocessing(size=(24, 24), mean=CLIP_MEAN, std=CLIP_STD, mode="pad")


def found(samples: list[Any], folder: Path, how: Any = "decode") -> list[tuple[str, str]]:
    survey = survey_samples(samples, image_folder=folder, template=TEMPLATES["v1"], check_images=how, workers=1)
    return [(finding.kind, finding.message) for finding in survey.findings]


def about(image: Any, *turns: str) -> dict[str, Any]:
    return {"image": image, "conversations": human_and_gpt(*(turns or ("<image>\na", "b")))}


def dataset(samples: list[Any], folder: Path, **options: Any) -> ConversationDataset:
    return ConversationDataset(
        samples,
        image_folder=folder,
        template=TEMPLATES["v1"],
        encoder=TextEncoder(make_tokenizer("llama")),
        preprocessing=PREPARE,
        layout=FixedLayout(999, 4),
        **({"max_length": 512} | options),
    )


# Keys


@pytest.mark.parametrize("tag", ["", "<image>\n"])
@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("pictures", ["a.jpg", "b.jpg"], "write 'image': ['a.jpg', …]"),
        ("image_path", "a.jpg", "write 'image': 'a.jpg'"),
        ("img", "a.jpg", "write 'image': 'a.jpg'"),
        ("Image", "a.jpg", "write 'image': 'a.jpg'"),
        ("image_file", "a.jpg", "write 'image': 'a.jpg'"),
        ("image_url", "http://x/a.jpg", "write 'image': 'http://x/a.jpg'"),
        ("img", [{"bytes": "…"}], "write 'image': name"),
        ("video", "a.mp4", "images alone are read: give the frames as 'image'"),
        ("audio_files", ["a.wav"], "images alone are read"),
    ],
)
def test_media_under_a_key_that_is_not_read_are_named(
    tmp_path: Path, key: str, value: Any, advice: str, tag: str
) -> None:
    [(kind, message)] = found([{key: value, "conversations": human_and_gpt(f"{tag}What?", "A.")}], tmp_path)

    assert kind == "unread_media"
    assert message.startswith(f"has '{key}', which is not read; {advice}")


def test_images_inside_a_turn_are_named(tmp_path: Path) -> None:
    turns = human_and_gpt("What?", "A.")
    turns[0]["image"] = "a.jpg"

    assert found([{"conversations": turns}], tmp_path) == [
        ("unread_media", "has 'image', which is not read; write 'image': 'a.jpg' beside 'conversations'")
    ]


def test_notes_about_an_image_are_no_fault(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    notes = {"image_id": "7", "image_url": "http://x/a.png", "images": [], "video": None, "image_size": [9, 9]}

    assert found([about("a.png") | notes], tmp_path) == []
    assert found([{"conversations": human_and_gpt("a", "b"), "image_id": 7, "imagination": "x"}], tmp_path) == []
    [(kind, _)] = found([about("a.png", "<image><image>", "b") | {"images": ["a.png", "a.png"]}], tmp_path)
    assert kind == "unread_media"


# Names


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("https://x.org/a.jpg", "is a URL, no file name"),
        ("s3://bucket/a.jpg", "is a URL, no file name"),
        ("data:image/png;base64," + "A" * 9999, "is the picture itself (data:), no file name"),
    ],
)
def test_links_are_told_from_names(tmp_path: Path, name: str, what: str) -> None:
    [(kind, message)] = found([about(name)], tmp_path)

    assert kind == "linked_image"
    assert message.endswith(what)
    assert len(message) < 250


def test_backslashes_are_mapped_by_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub" / "dir").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "sub" / "dir" / "c.jpg")
    samples = [about("sub\\dir\\c.jpg"), about("sub\\dir\\c.png"), about("sub\\d.jpg"), about("..\\c.jpg")]
    (tmp_path / "a.json").write_text(json.dumps(samples))
    Image.new("RGB", (9, 9)).save(tmp_path.parent / "c.jpg")

    assert [kind for kind, _ in found(samples, tmp_path)] == ["backslash_name"] * 2 + ["missing_image"] * 2
    assert main(["check", "--data", str(tmp_path / "a.json"), "--image-folder", str(tmp_path), "--fix"]) == 1
    assert [sample["image"] for sample in read_samples(tmp_path / "a.clean.jsonl")] == ["sub/dir/c.jpg"] * 2
    assert "written with backslashes, the file is sub/dir/c.jpg" in " ".join(capsys.readouterr().out.split())


def test_halves_of_characters_are_found_shown_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"id": "i\ud83d", "conversations": human_and_gpt("a", "b \ud83d")}
    (tmp_path / "a.json").write_text(json.dumps([bad, about("\ud83d.png"), {"\ud800": 1}]))
    assert main(["check", "--data", str(tmp_path / "a.json"), "--image-folder", str(tmp_path)]) == 1
    shown = capsys.readouterr().out

    assert "half_character" in shown
    assert r"sample i\ud83d: has half of a character in its text" in shown
    assert r"image \ud83d.png" in shown
    with pytest.raises(BadSampleError, match=r"sample i\\ud83d: the text .* holds half of a character"):
        dataset([bad], tmp_path)[0]
    assert "half of a character" in dataset([bad], tmp_path, bad_samples="skip")[0]["skipped"]
    assert printable("x" * 5000).count("x") == 400


# Pictures


def pictures(folder: Path) -> list[str]:
    """Files of every mode that Pillow writes in the formats that data sets have."""
    whole = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    colours, names = Image.fromarray(whole[..., :3].copy()), []
    modes: dict[str, Image.Image] = {mode: colours.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr")}
    modes |= {"LA": Image.fromarray(whole).convert("LA"), "RGBA": Image.fromarray(whole)}
    modes |= {"I;16": Image.fromarray(whole[..., 0].astype(np.uint16) * 257), "F": colours.convert("F")}
    modes |= {"I": colours.convert("I"), "LAB": Image.new("LAB", (30, 20))}
    for form in ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "jpeg2000", "sgi", "tga", "ico"):
        for mode, image in modes.items():
            name = f"{mode.replace(';', '')}.{form}"
            try:
                image.save(folder / name, format=form)
            except (OSError, KeyError, ValueError):  # no such mode in this format
                (folder / name).unlink(missing_ok=True)
                continue
            names.append(name)
    frames = [Image.new("P", (8, 8), number) for number in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    transparent = colours.convert("P")
    transparent.save(folder / "transparent.png", transparency=bytes(range(256)))
    for width, height in ((3000, 2), (2, 3000), (7, 7), (1, 1)):
        Image.new("RGB", (width, height)).save(folder / f"{width}x{height}.jpeg")
        names.append(f"{width}x{height}.jpeg")
    return [*names, "moving.gif", "transparent.png"]


def verdicts(folder: Path, name: str) -> tuple[bool, bool, bool]:
    """Whether the doctor, training and inference take a file."""
    doctor = not find_broken_images(folder, [name])
    sample = dataset([about(name)], folder, bad_samples="skip")[0]
    try:
        read = read_image(folder / name)
    except UnreadableImageError as error:
        assert str(error).startswith(f"image {folder / name} cannot be read (")
        return doctor, "skipped" not in sample, False
    np.testing.assert_array_equal(sample["pixel_values"][0], PREPARE.pixels(read))
    return doctor, "skipped" not in sample, True


def has_a_range(path: Path) -> bool:
    """Whether Pillow, which does not read all that it writes, reads a file as values of a known range."""
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return False
    return image.mode not in {"F", "LAB"} and (image.mode != "I" or image.format in {"PNG", "PPM"})


def test_doctor_training_and_inference_agree_on_every_mode_and_format(tmp_path: Path) -> None:
    names = pictures(tmp_path)
    taken = {name: verdicts(tmp_path, name) for name in names}

    assert len(names) > 50
    assert all(len(set(verdict)) == 1 for verdict in taken.values()), taken
    refused = {name for name, verdict in taken.items() if not any(verdict)}
    assert refused == {name for name in names if not has_a_range(tmp_path / name)} >= {"F.tiff", "I.tiff", "LAB.tiff"}
    grey = read_image(tmp_path / "I16.png")
    np.testing.assert_array_equal(np.asarray(grey), np.asarray(read_image(tmp_path / "I16.tiff")))
    assert 100 < np.asarray(grey).mean() < 155
    assert [kind for kind, _ in found([about("I16.png"), about("F.tiff"), about("F.tiff")], tmp_path, "size")] == [
        "deep_image",
        "unclear_values",
        "unclear_values",
    ]


def test_doctor_training_and_inference_agree_on_damaged_files(tmp_path: Path) -> None:
    generator, names = random.Random(0), []
    for name in pictures(tmp_path)[::3]:
        content = (tmp_path / name).read_bytes()
        for number in range(4):
            damaged = bytearray(content if number else content[: len(content) // 2])
            for _ in range(number * 4):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            names.append(f"damaged-{number}-{name}")
            (tmp_path / names[-1]).write_bytes(damaged)

    for name in names:
        assert len(set(verdicts(tmp_path, name))) == 1, name


def test_turned_pictures_are_counted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for ending in ("jpg", "png", "webp"):
        Image.new("RGB", (9, 6)).save(tmp_path / f"a.{ending}", exif=exif)
    samples = [about(f"a.{ending}") for ending in ("jpg", "png", "webp")]

    for how in ("size", "decode"):
        assert [kind for kind, _ in found(samples, tmp_path, how)] == ["turned_image"] * 3
    assert "is to be turned by its Exif data (orientation 6)" in found(samples, tmp_path)[0][1]


def test_a_picture_that_is_too_long_is_known_to_the_doctor(tmp_path: Path) -> None:
    Image.new("1", (2**17 + 1, 1)).save(tmp_path / "a.png")

    for how in ("size", "decode"):
        [(kind, message)] = found([about("a.png")], tmp_path, how)
        assert kind == "large_image"
        assert "no edge may be longer than 131,072" in message


@pytest.mark.parametrize("size", [(8, 8), (6000, 6000)])
def test_no_memory_is_a_fault_of_large_pictures_only(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", size).save(tmp_path / "a.png")

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError if size == (8, 8) else UnreadableImageError):
        read_image(tmp_path / "a.png")
