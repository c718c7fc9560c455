"""`python -m integrations.llava data`: check, report, clean file, conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from integrations.llava.cli.data import main
from integrations.llava.data import read_samples
from integrations.llava.data.doctor.findings import KINDS
from tests.integrations.llava.prompts.published_templates import PUBLISHED, family_tokenizer
from tests.integrations.llava.tiny_parts import human_and_gpt, make_tokenizer

SOURCES = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")


def sample(own_id: Any, image: str | None, *turns: str) -> dict[str, Any]:
    text = turns or ("<image>\nWhat is it?" if image else "What is it?", "A boat.")
    return {"id": own_id, **({"image": image} if image else {}), "conversations": human_and_gpt(*text)}


def write(path: Path, samples: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in samples))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of all sources, and `clean.jsonl` with a sample about each and one without image."""
    for source in SOURCES:
        (tmp_path / source).mkdir(parents=True)
        Image.effect_noise((60, 40), 50).convert("RGB").save(tmp_path / source / "good.jpg")
    samples = [sample(f"good {source}", f"{source}/good.jpg") for source in SOURCES]
    write(tmp_path / "clean.jsonl", [*samples, sample("good text", None)])
    return tmp_path


@pytest.fixture
def faulty(folder: Path) -> Path:
    """`faulty.jsonl`: the clean samples and twelve that cannot be used, each for another reason."""
    images = folder / "ocr_vqa" / "images"
    whole = (images / "good.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "zero.jpg").write_bytes(b"")
    (images / "page.jpg").write_text("<html>404 Not Found</html>")
    Image.new("RGB", (300, 300)).save(images / "huge.jpg")
    Image.new("P", (20, 20)).save(images / "book.gif")
    Image.new("RGB", (20, 20)).save(folder.parent / "outside.jpg")
    clean = (folder / "clean.jsonl").read_text().splitlines()
    faults = [
        sample("gone", "ocr_vqa/images/gone.jpg"),
        sample("cut", "ocr_vqa/images/cut.jpg"),
        sample("zero", "ocr_vqa/images/zero.jpg"),
        sample("page", "ocr_vqa/images/page.jpg"),
        sample("huge", "ocr_vqa/images/huge.jpg"),
        sample("gif", "ocr_vqa/images/book.jpg"),
        sample("outside", "../outside.jpg"),
        {"id": "order", "conversations": [{"from": "human", "value": "a"}] * 2},
        sample("tags", "gqa/images/good.jpg", "What is it?", "A boat."),
        {"id": "role", "conversations": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]},
        sample("long", None, "Why? " * 400, "Because."),
        '{"id": "half", "conversations": [',
    ]
    return write(folder / "faulty.jsonl", [*clean[:3], *faults, *clean[3:]])


PLANTED = {
    "gone": "missing_image",
    "cut": "truncated_image",
    "zero": "empty_image",
    "page": "broken_image",
    "huge": "large_image",
    "gif": "wrong_extension",
    "outside": "outside_folder",
    "order": "turn_order",
    "tags": "image_tags",
    "role": "bad_turn",
    "long": "nothing_supervised",
    "14": "not_json",  # a line that cannot be read has no id, so its index stands for it
}


def run(data: Path, *options: Any) -> int:
    return main(["check", "--data", str(data), "--image-folder", str(data.parent), *map(str, options)])


def test_twelve_planted_faults_are_found_and_nothing_else(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer("llama").save_pretrained(tmp_path / "tokenizer")
    options = ["--max-pixels", 60_000, "--tokenizer", tmp_path / "tokenizer", "--image-tokens", 16, "--max-length", 300]
    assert run(faulty, *options, "--report", tmp_path / "report.json") == 1
    report = json.loads((tmp_path / "report.json").read_text())

    assert {problem["sample_id"]: problem["kind"] for problem in report["problems"]} == PLANTED
    assert len(report["problems"]) == len(PLANTED) == len(set(PLANTED.values())) == 12
    assert report["warnings"] == []
    assert [problem["index"] for problem in report["problems"]] == list(range(3, 15))
    assert [problem["place"] for problem in report["problems"]] == [f"line {number}" for number in range(4, 16)]
    assert report["num_samples"] == 18
    assert report["num_usable"] == 6
    assert "12 findings: 12 problems and 0 warnings; 6 of 18 samples can be used." in capsys.readouterr().out


def test_a_clean_folder_is_clean(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder / "clean.jsonl", "--strict") == 0
    assert "6 samples, nothing found." in capsys.readouterr().out


def test_the_report_counts_by_source_and_kind(faulty: Path, tmp_path: Path) -> None:
    run(faulty, "--report", tmp_path / "report.json", "--workers", 1)
    report = json.loads((tmp_path / "report.json").read_text())

    assert report["sources"]["ocr_vqa"] == {"samples": 7, "images": 7, "problems": 5, "warnings": 0}
    assert report["sources"]["text only"] == {"samples": 4, "images": 0, "problems": 2, "warnings": 0}
    assert report["sources"]["gqa"] == {"samples": 2, "images": 1, "problems": 1, "warnings": 0}
    assert report["num_images"] == sum(source["images"] for source in report["sources"].values()) == 11
    kind = KINDS["wrong_extension"]
    assert report["kinds"]["wrong_extension"] == {
        "level": "problem",
        "title": kind.title,
        "advice": kind.advice,
        "findings": 1,
        "samples": 1,
        "images": 1,
    }
    assert report["problems"][4] == {
        "kind": "wrong_extension",
        "index": 8,
        "place": "line 9",
        "sample_id": "gif",
        "source": "ocr_vqa",
        "message": "image ocr_vqa/images/book.jpg: missing, but book.gif is there",
        "image": "ocr_vqa/images/book.jpg",
        "repair": "ocr_vqa/images/book.gif",
    }
    assert report["settings"]["data"] == str(faulty)
    assert report["settings"]["images"] == "decode"


def test_the_tables_name_the_first_case_and_what_to_do(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(faulty)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    assert "ocr_vqa 7 7 5 –" in lines
    assert "total 18 11 10 –" in lines
    assert "1 × image has another ending (wrong_extension)" in lines
    assert "Name the file that is there; --fix does." in lines
    assert "Problems: training cannot use these samples." in lines
    assert not any(line.startswith("Warnings") for line in lines)
    assert any(line.startswith("line 11, sample order: turns are human, human") for line in lines)


def test_warnings_alone_are_no_failure_unless_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(folder / "odd.jsonl", [sample("a", None, "What is </s>?", "A token."), sample("a", None)])

    assert run(data) == 0
    assert "2 findings: 0 problems and 2 warnings; 2 of 2 samples can be used." in capsys.readouterr().out
    assert run(data, "--strict") == 1


# The clean file


def test_fix_repairs_endings_and_leaves_out_the_rest(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = faulty.read_bytes()
    assert run(faulty, "--fix", "--max-pixels", 60_000) == 1
    cleaned = read_samples(faulty.parent / "faulty.clean.jsonl")

    assert faulty.read_bytes() == before
    kept = list(read_samples(faulty.parent / "clean.jsonl"))
    repaired = sample("gif", "ocr_vqa/images/book.gif")
    assert list(cleaned) == [*kept[:3], repaired, sample("long", None, "Why? " * 400, "Because."), *kept[3:]]
    assert "with 8 samples, 1 repaired, 10 left out;" in capsys.readouterr().out
    assert run(faulty.parent / "faulty.clean.jsonl", "--max-pixels", 60_000, "--strict") == 0


def test_fix_corrects_one_name_of_several_but_drops_what_has_another_fault(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    text = human_and_gpt("<image> and <image>: the same?", "Ja, schön.")
    good, lost = ({"image": ["a.jpg", f"{second}.png"], "note": 1, "conversations": text} for second in ("a", "gone"))
    (folder / "pairs.json").write_text(json.dumps([lost, good], indent=2))
    assert run(folder / "pairs.json", "--fix") == 1

    assert list(read_samples(folder / "pairs.clean.jsonl")) == [good | {"image": ["a.png", "a.png"]}]


def test_fix_never_writes_over_a_file(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (faulty.parent / "faulty.clean.jsonl").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        run(faulty, "--fix")

    assert (faulty.parent / "faulty.clean.jsonl").read_text() == "mine"
    assert "faulty.clean.jsonl exists and is left alone; move it away or remove it" in capsys.readouterr().err


def test_fix_writes_nothing_where_nothing_is_wrong_or_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder / "clean.jsonl", "--fix") == 0
    assert not (folder / "clean.clean.jsonl").exists()
    write(folder / "hopeless.jsonl", [{}, 5])
    assert run(folder / "hopeless.jsonl", "--fix") == 1
    assert not (folder / "hopeless.clean.jsonl").exists()
    assert "can be used, so there is nothing to write" in capsys.readouterr().err


# Conversion


def test_convert_writes_one_sample_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [sample(1, None, "two\nlines  and\r\ttabs", "ä\u2028"), sample("b", None)]
    (folder / "x.json").write_text(json.dumps(samples, indent=4, ensure_ascii=False), encoding="utf-8")
    assert main(["convert", "--data", str(folder / "x.json")]) == 0

    assert (folder / "x.jsonl").read_bytes().count(b"\n") == 2
    assert read_samples(folder / "x.jsonl") == samples
    assert "2 samples:" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "--data", str(folder / "x.json")])
    assert "x.jsonl exists and is left alone" in capsys.readouterr().err
    assert main(["convert", "--data", str(folder / "x.json"), "--output", str(folder / "y.jsonl")]) == 0
    assert (folder / "y.jsonl").read_bytes() == (folder / "x.jsonl").read_bytes()
    assert not list(folder.glob(".*.part"))
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "--data", str(folder / "y.jsonl")])
    assert "y.jsonl already has one sample a line; there is nothing to convert" in capsys.readouterr().err


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--data", "nowhere.json", "--image-folder", "."], "nowhere.json does not exist"),
        (["check", "--data", "nowhere.json", "--image-folder", "nowhere"], "image folder nowhere does not exist"),
        (["check", "--data", "a.json"], "a.json does not exist"),
        (["check", "--data", "a", "--image-folder", ".", "--template", "v2"], "invalid choice: 'v2'"),
        (["convert", "--data", "a.jsonl"], "a.jsonl does not exist"),
        ([], "required: command"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        run(folder / "clean.jsonl", "--tokenizer", folder / "empty")
    assert "tokenizer" in capsys.readouterr().err


def test_a_template_is_made_of_the_tokenizer_that_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder / "clean.jsonl", "--template", "tokenizer") == 1
    assert "--template tokenizer is made of a tokenizer; name it, too: --tokenizer" in capsys.readouterr().err
    tokenizer = family_tokenizer(PUBLISHED["qwen2.5"])
    tokenizer.save_pretrained(folder / "qwen")
    assert run(folder / "clean.jsonl", "--template", "tokenizer", "--tokenizer", folder / "qwen") == 0
    assert run(folder / "clean.jsonl", "--template", "gemma", "--tokenizer", folder / "qwen") == 1
    assert "template 'gemma' writes <start_of_turn>, <end_of_turn>, and" in capsys.readouterr().err


def test_a_file_that_is_no_json_fails_with_the_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "half.json").write_text('[{"id": 1}, {"id"')

    assert run(folder / "half.json") == 1
    assert "half.json is not valid JSON: Expecting ':' delimiter (entry 2, byte 12)" in capsys.readouterr().err
