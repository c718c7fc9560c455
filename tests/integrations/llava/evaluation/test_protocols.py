"""What tasks say of themselves (protocol, files, metric), and the files of benchmarks that they share readers for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from integrations.llava.evaluation import ColorTask, NeededFile, Question, Task, evaluate
from integrations.llava.evaluation.made_images import image_digest, png_bytes, store_image
from integrations.llava.evaluation.published_files import parquet_rows, read_llava_questions, read_published_json
from integrations.llava.inference.predictor import Predictor


class Two(Task):
    protocols = ("llava", "lmms")
    answer_lengths: ClassVar[Mapping[str, int]] = {"lmms": 16}

    def load(self, folder: str | Path) -> list[Question]:
        return [Question(0, (), "?", "two", "a")]

    def needs(self) -> tuple[NeededFile, ...]:
        return (NeededFile("two/questions.jsonl", "questions", "example.org"),)

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        return {"accuracy": float(answer == "a")}


class WithItsOwnStart(Two):
    def __init__(self) -> None:
        self.started = True


def test_the_first_protocol_is_the_default_and_an_unknown_one_is_refused() -> None:
    assert (Two().protocol, Two("lmms").protocol, WithItsOwnStart().protocol) == ("llava", "lmms", "llava")
    assert (Two().max_new_tokens, Two(protocol="lmms").max_new_tokens) == (None, 16)
    assert (ColorTask().protocol, ColorTask().metric, ColorTask().shown_as) == ("llava", "accuracy", "percent")
    with pytest.raises(ValueError, match="protocol 'official' is unknown to Two; it has: llava, lmms"):
        Two("official")


def test_a_question_is_drawn_alone_and_a_task_says_what_it_reads() -> None:
    assert Two().unit(Question(7, (), "?", "two")) == 7
    assert [own.path for own in ColorTask().needs()] == ["test.jsonl", "images"]


@pytest.mark.parametrize(
    ("task", "given", "expected"),
    [(Two(), None, 32), (Two("lmms"), None, 16), (Two("lmms"), 5, 5)],
)
def test_answers_are_as_long_as_asked_or_as_the_protocol_says(
    task: Task, given: int | None, expected: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def answer_batch(_: Predictor, batch: Mapping[str, Any], keys: list[str], sampling: Any) -> list[str]:
        seen.append(sampling.max_new_tokens)
        return ["a"] * len(keys)

    monkeypatch.setattr(Predictor, "answer_batch", answer_batch)
    evaluate(run, task, tmp_path, max_new_tokens=given, device="cpu")
    assert seen == [expected]


def test_a_picture_is_stored_once_under_the_name_that_tells_it_apart(tmp_path: Path) -> None:
    made = []

    def content() -> bytes:
        made.append(1)
        return png_bytes(Image.new("RGB", (2, 3), "red"))

    name = f"bench/7-{image_digest('a', b'b')}.png"
    stored = [store_image(tmp_path, name, content) for _ in range(2)]
    assert stored == [f"layerfuse_images/{name}"] * 2
    assert len(made) == 1
    with Image.open(tmp_path / stored[0]) as image:
        assert image.size == (2, 3)
    assert len({image_digest("a", "b"), image_digest("ab"), image_digest("b", "a"), image_digest("a")}) == 4
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written .*Give a folder that can be written to"):
        store_image(tmp_path / "file", "a.png", content)


def test_question_files_of_llava_are_read_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    path = tmp_path / "two" / "questions.jsonl"
    rows = [
        {"question_id": 3, "image": "a.jpg", "text": "What?\nAnswer.", "category": "default"},
        {"question_id": "x", "text": "Why?"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = read_llava_questions(Two(), "two", tmp_path, "two/questions.jsonl", "two/images")
    assert asked == [
        Question(3, "two/images/a.jpg", "What?\nAnswer.", "two", fields={"category": "default"}),
        Question("x", (), "Why?", "two"),
    ]
    assert asked[0].fields == {"category": "default"}
    for line, fault in [
        ('{"question_id": true, "text": "a"}', "line 1 is no question; it needs question_id"),
        ('{"question_id": 1}', "line 1 is no question"),
        ('{"question_id": 1, "text": "a", "image": 3}', "line 1: image is 3; give a name"),
        ("", "holds no question; give the whole file"),
    ]:
        path.write_text(line + "\n" if line else "")
        with pytest.raises(ValueError, match=fault):
            read_llava_questions(Two(), "two", tmp_path, "two/questions.jsonl", "two/images")
    path.unlink()
    message = r"questions\.jsonl does not exist \(questions; example\.org\); give the folder that holds two/questions"
    with pytest.raises(FileNotFoundError, match=message):
        read_llava_questions(Two(), "two", tmp_path, "two/questions.jsonl", "two/images")


def test_json_of_a_benchmark_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    assert read_published_json(Two(), tmp_path, "a.json") == [1, 2]
    (tmp_path / "a.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"a\.json is no JSON .*get it anew"):
        read_published_json(Two(), tmp_path, "a.json")


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\*\.parquet does not exist"):
        next(parquet_rows(Two(), tmp_path, "*.parquet"))
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for name, ids in (("b", [3]), ("a", [1, 2])):
        table = pyarrow.table({"id": ids, "image": [{"bytes": bytes([own]), "path": None} for own in ids]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    rows = list(parquet_rows(Two(), tmp_path, "*.parquet", ["id", "image"]))
    assert [(row["id"], row["image"]["bytes"]) for row in rows] == [(1, b"\x01"), (2, b"\x02"), (3, b"\x03")]
    with pytest.raises(ValueError, match=r"a\.parquet lacks words; it has id, image"):
        next(parquet_rows(Two(), tmp_path, "*.parquet", ["words"]))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        next(parquet_rows(Two(), tmp_path, "*.parquet"))


def test_a_missing_package_is_told_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow, which is not installed; `pip install layerfuse\[parquet\]`"):
        next(parquet_rows(Two(), tmp_path, "*.parquet"))
