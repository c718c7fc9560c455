"""Damaged data of every form, each named with its place; folders, tars and tables that are none."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from integrations.llava.data import BadSampleError, image_names, read_samples, source_of, tables
from integrations.llava.data.source import image_places
from tests.integrations.llava.data.forms_support import (
    FORMS,
    asked,
    dataset,
    found,
    samples_about,
    tar_of,
    write_table,
)
from tests.integrations.llava.tiny_parts import human_and_gpt


def two(tmp_path: Path) -> tuple[list[dict[str, Any]], list[tuple[str, bytes]]]:
    """Two samples, and the members of their tar."""
    samples = samples_about(tmp_path, 2)
    return samples, [
        (f"{index}.{ending}", content)
        for index, sample in enumerate(samples)
        for ending, content in (
            (Path(sample["image"]).suffix[1:], (tmp_path / sample["image"]).read_bytes()),
            ("json", json.dumps(sample).encode()),
        )
    ]


@pytest.mark.parametrize(
    ("members", "kind", "message"),
    [
        ([("1.jpg", b"again")], "unreadable_sample", "has two members of the name 1.jpg"),
        ([("../2.png", b"x"), ("../2.txt", b"x")], "outside_folder", "has a member ../2.png, which leads out of the"),
        ([("/2.txt", b"x")], "outside_folder", "has a member /2.txt, which leads out"),
        ([("2.png", b"x")], "unreadable_sample", "has 2.png and no text: give a .json or .txt of the same name"),
        ([("2.mp4", b"x"), ("2.txt", b"A.")], "unread_media", "has 'video', which is not read; images alone are read"),
        ([("2.txt", b"A\xff")], "unreadable_sample", "has a text that is not UTF-8 (invalid start byte, byte 1)"),
        ([("2.json", b"{")], "not_json", "has a text that is no valid JSON: Expecting property name"),
        ([("2.json", b"[]")], "not_an_object", "is a list, so it has no 'conversations'"),
        ([("2.txt", b"A."), ("2.0.png", b""), ("2.1.jpg", b"x")], "image_tags", "has 2 images but 3"),
        ([("2.txt", b"A."), ("2.png", b"")], "empty_image", "image a.tar/2.png: corrupt, zero bytes"),
    ],
)
def test_a_damaged_member_is_named_with_its_sample(
    tmp_path: Path, members: list[tuple[str, bytes]], kind: str, message: str
) -> None:
    _, sound = two(tmp_path)
    if kind == "image_tags":
        turns = human_and_gpt("<image><image><image>", "A.")
        members = [("2.json", json.dumps({"conversations": turns}).encode()), *members[1:]]
    path = tar_of([*sound, *members, ("README.md", b"x"), ("._1.png", b"x")], tmp_path / "a.tar")
    [(own, place, said), *_] = found(path, tmp_path, check_images="none" if kind == "image_tags" else "decode")

    number = 2 if members[0][0] == "1.jpg" else 3
    assert own == kind and place.startswith(f"sample {number} (") and message in said
    assert len(read_samples(path)) == max(number, 2)


def test_a_damaged_tar_is_refused_with_its_last_whole_member(tmp_path: Path) -> None:
    _, members = two(tmp_path)
    path = tar_of(members, tmp_path / "a.tar")
    whole = path.read_bytes()
    cut = whole.index(b"1.json") + 520
    for name, content, message in (
        ("a.tar", whole[:cut], r"is no whole tar behind its member 1.jpg \(unexpected end of data\)"),
        ("b.tar", b"x" * 2000, r"is no whole tar \(.*; get it anew, and unpack .gz"),
        ("c.tar", bytes(10240), "holds no samples; give a tar with name.jpg and name.json or .txt"),
        ("d.tar.gz", b"\x1f\x8b", "is packed, and no sample can be found in it by its number; unpack it"),
        ("e.mp4", b"x", "is a video, and images alone are read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_samples(tmp_path / name)


def test_a_link_in_a_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(info)
    with pytest.raises(ValueError, match="has a member 0.png that is a link; store the file"):
        read_samples(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": b"x", "text": "A."},
            "has the columns image, text; it needs conversations, or messages, or question",
        ),
        ({"jpg": b"x", "caption": "A."}, "holds bytes in jpg; a sample's images stand in one column, image or images"),
        ({"image": b"x", "images": [b"x"], "caption": "A."}, "holds bytes in image, images; a sample's images stand"),
    ],
)
def test_a_table_of_other_columns_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_samples(write_table([row], tmp_path / "a.parquet"))


def test_damaged_tables_are_refused_and_cells_are_named(tmp_path: Path) -> None:
    samples, _ = two(tmp_path)
    rows = [{**sample, "image": (tmp_path / sample["image"]).read_bytes()} for sample in samples]
    path = write_table(rows, tmp_path / "a.parquet")
    for name, content, message in (
        ("b.parquet", path.read_bytes()[:-30], "is no whole parquet or arrow file"),
        ("c.arrow", b"ARROW1" + bytes(99), "is no whole parquet or arrow file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_samples(tmp_path / name)
    empty = write_table(rows, tmp_path / "d.parquet", row_group_size=9)
    parquet.write_table(pa.Table.from_pylist(rows).slice(0, 0), empty)
    with pytest.raises(ValueError, match="holds no rows"):
        read_samples(empty)
    qa = [
        {"image": cell, "question": "What?", "answer": answer}
        for cell, answer in ((rows[0]["image"], "A."), (b"", "A."), (None, "A."), (b"no picture", "A."))
    ]
    assert [(kind, place) for kind, place, _ in found(write_table(qa, tmp_path / "e.parquet"), tmp_path)] == [
        ("empty_image", "row 2"),
        ("bad_image_entry", "row 3"),
        ("broken_image", "row 4"),
    ]
    [(_, _, said)] = found(
        write_table([{"id": 1, "video": "a.mp4", "caption": "A."}], tmp_path / "f.parquet"), tmp_path
    )
    assert said.startswith("has 'video', which is not read; images alone are read")


def test_pages_of_a_table_that_are_damaged_are_named_by_row_and_image(tmp_path: Path) -> None:
    samples, _ = two(tmp_path)
    rows = [{**sample, "image": {"bytes": (tmp_path / sample["image"]).read_bytes(), "path": ""}} for sample in samples]
    path = write_table(rows, tmp_path / "a.parquet", row_group_size=1, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = data.index(rows[1]["image"]["bytes"][:20])
    data[start - 4 : start] = bytes([255] * 4)  # the length of the cell
    path.write_bytes(data)

    assert [own[:2] for own in found(path, tmp_path)] == [("broken_image", "row 2")]
    with pytest.raises(BadSampleError, match="sample s1: image .*a.parquet: 1-0 cannot be read"):
        dataset(read_samples(path), tmp_path)[1]


def test_texts_of_a_table_that_are_damaged_are_named_by_row(tmp_path: Path) -> None:
    rows = [{"question": f"What is {number}?" * 9, "answer": "A."} for number in range(2)]
    path = write_table(rows, tmp_path / "a.parquet", row_group_size=1, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = data.index(b"What is 1?")
    data[start - 4 : start] = bytes([255] * 4)
    path.write_bytes(data)
    [(kind, place, said)] = found(path, tmp_path)

    assert (kind, place) == ("unreadable_sample", "row 2") and said.startswith("cannot be read (")
    with pytest.raises(ValueError, match="a.parquet, row 2 cannot be read"):
        _ = read_samples(path)[1]


def test_row_groups_are_forgotten_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = samples_about(tmp_path, 9)
    rows = [{**sample, "image": (tmp_path / sample["image"]).read_bytes()} for sample in samples]
    path = write_table(rows, tmp_path / "a.parquet", row_group_size=2)
    monkeypatch.setattr(tables, "_KEEP", 1)
    read = read_samples(path)

    assert "row groups of up to 0.0 GiB, and each row is read with its group; write smaller ones" in caplog.text
    for index in (8, 0, 5, 0, 8, 3):
        [name] = image_names(read[index])
        assert (image_places(read, "") / name).read_bytes() == rows[index]["image"]
        assert read[index]["conversations"] == samples[index]["conversations"]


def test_what_reads_a_table_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table([{"caption": "A."}], tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(ImportError, match=r"needs pyarrow, which is not installed; `pip install layerfuse\[parquet\]`"):
        read_samples(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "image,text\na.png,x\n",
            "has the columns image, text; its first line has to name question and answer, or caption",
        ),
        ("", "is empty"),
        ('image,caption\na.png,"x\n', "line 2 is no row of a table .*write a quote in it twice"),
        ("image,caption\n", "holds an empty list"),
    ],
)
def test_a_text_table_that_is_none_is_refused(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / "a.csv")


def test_rows_of_a_text_table_that_are_damaged_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rows = [
        b"\xef\xbb\xbfimage\tcaption\tnote",
        b"a.png\tfine\t",
        b"",
        b"a.png\t",
        b"a.png\t\xff\t",
        b'a.png\t"a\nb"\t',
    ]
    (tmp_path / "a.tsv").write_bytes(b"\r\n".join([*rows, b"\tno image\t", b"b.mp4\tx\t"]))

    assert [own[:2] for own in found(tmp_path / "a.tsv", tmp_path)] == [
        ("unreadable_sample", "line 4"),
        ("unreadable_sample", "line 5"),
        ("bad_image_entry", "line 8"),
        ("unread_media", "line 9"),
        ("missing_image", "line 9"),
    ]
    assert "has 2 cells, and there are 3 columns" in found(tmp_path / "a.tsv", tmp_path)[0][2]
    assert "is not UTF-8 (invalid start byte)" in found(tmp_path / "a.tsv", tmp_path)[1][2]
    assert read_samples(tmp_path / "a.tsv")[3]["conversations"][1]["value"] == "a\nb"


# Folders


def test_a_folder_that_is_no_data_set_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    samples = samples_about(tmp_path, 2)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "0.txt").write_text("A.")
    with pytest.raises(
        ValueError, match=r"holds 0 tables .* and no images/.* make a tar: tar -cf data.tar -C .*pairs \."
    ):
        read_samples(tmp_path / "pairs")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="of several splits; give one of them: .*splits/train, .*splits/test"):
        read_samples(tmp_path / "splits")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_table([samples[0]], tmp_path / "hub" / "data" / f"{name}.parquet")
    with pytest.raises(
        ValueError, match=r"several data sets or splits; .* .*data/test\*.parquet, .*data/train\*.parquet"
    ):
        read_samples(tmp_path / "hub")
    shards = read_samples(f"{tmp_path}/hub/data/train*.parquet")
    assert len(shards) == 2 and source_of(shards, 1) == "train*.parquet"
    assert shards.place(1) == "train*.parquet/train-00001-of-00002.parquet, row 1"


def test_shards_of_one_folder_are_one_source(tmp_path: Path) -> None:
    samples = samples_about(tmp_path, 6)
    (tmp_path / "shards").mkdir()
    for number in range(3):
        FORMS["tar"](samples[2 * number : 2 * number + 2], tmp_path, tmp_path).rename(tmp_path / f"shards/{number}.tar")
    read = read_samples(tmp_path / "shards")

    assert [sample["id"] for sample in read] == [sample["id"] for sample in samples]
    assert image_names(read[5]) == ("shards/2.tar/000001.jpg",) and read.images_inside
    assert not found(tmp_path / "shards", tmp_path / "nowhere")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="is a pipe or device, in which no sample can be found by its number"):
        read_samples(tmp_path / "a.tar")


def test_a_caption_is_the_text_beside_an_image(tmp_path: Path) -> None:
    samples_about(tmp_path, 1)
    content = (tmp_path / "0.png").read_bytes()
    path = tar_of([("x/0.png", content), ("x/0.txt", b" A cat.\n")], tmp_path / "a.tar")

    assert list(read_samples(path)) == [
        {"id": "x/0", "image": "a.tar/x/0.png", "conversations": human_and_gpt("<image>", "A cat.")}
    ]
    assert asked(read_samples(path)[0]) == ("<image>", "A cat.")
