from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from integrations.llava.evaluation import Question, predict, read_image, read_questions

ROW = {"question_id": 7, "image": "a.png", "text": "Where?", "kind": "box", "answer": [0.1, 0.2, 0.3, 0.4]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def make_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    return folder


def test_question_file_keeps_numbers_of_a_box(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "q.jsonl", ROW, ""))
    assert question == Question(7, "a.png", "Where?", "box", (0.1, 0.2, 0.3, 0.4))


def test_missing_question_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.jsonl does not exist"):
        read_questions(tmp_path / "none.jsonl")


def test_empty_question_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(write(tmp_path / "q.jsonl", ""))


def test_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2 is not JSON"):
        read_questions(write(tmp_path / "q.jsonl", ROW, "{"))


def test_missing_keys_of_a_question_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1 lacks kind, answer; a question has question_id"):
        read_questions(write(tmp_path / "q.jsonl", {key: ROW[key] for key in ("question_id", "image", "text")}))


def test_unknown_kind_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"question kind 'boxs' is unknown; did you mean 'box'\?"):
        read_questions(write(tmp_path / "q.jsonl", {**ROW, "kind": "boxs"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ocr", "answer": ["3", "4"]}, r'answer is \["3", "4"\]; give a text'),
        ({"kind": "counting", "answer": None}, "answer is null; give a text or a number"),
        ({"kind": "color", "answer": True}, "answer is true; give a text"),
        ({"kind": "color", "answer": float("nan")}, "answer is NaN; give a text"),
        ({"kind": "counting", "answer": "many"}, "answer is many; give one whole number"),
        ({"answer": [0.1, 0.2, 0.3]}, "answer is .*; give a box"),
        ({"answer": ["0.1", "0.2", "0.3", "0.4"]}, "answer is .*; give a box"),
        ({"answer": [0.3, 0.2, 0.1, 0.4]}, "answer is .*; give a box"),
        ({"answer": [0.1, 0.2, float("nan"), 0.4]}, "answer is .*; give a box"),
        ({"answer": "somewhere"}, "answer is .*; give a box"),
        ({"question_id": None}, "question_id is null; give a number or a text"),
        ({"question_id": [1]}, r"question_id is \[1\]; give a number or a text"),
        ({"image": ["a.png", 1]}, "image is .*; give a text, several in a list, or null"),
        ({"image": 3}, "image is 3; give a text"),
        ({"text": None}, "text is null; give a text"),
        ({"text": "\ud83d"}, "holds half of a character"),
    ],
)
def test_what_would_be_asked_or_scored_otherwise_is_refused_with_its_line(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"q\.jsonl, line 2:? {message}"):
        read_questions(write(tmp_path / "q.jsonl", ROW, {**ROW, "question_id": 8, **change}))


@pytest.mark.parametrize(
    ("image", "names"), [("a.png", ("a.png",)), (["a.png", "b.png"], ("a.png", "b.png")), ([], ()), (None, ())]
)
def test_a_question_has_one_image_several_or_none(image: object, names: tuple[str, ...], tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "q.jsonl", {**ROW, "image": image}))
    assert question.images == names
    (again,) = read_questions(write(tmp_path / "again.jsonl", question.row()))
    assert again == question


def test_further_keys_of_a_row_stay_with_the_question(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "q.jsonl", {**ROW, "category": "left", "choices": ["a"]}))
    assert question.fields == {"category": "left", "choices": ["a"]}
    assert hash(question) == hash(read_questions(tmp_path / "q.jsonl")[0])
    assert question.row() == {**ROW, "answer": (0.1, 0.2, 0.3, 0.4), "category": "left", "choices": ["a"]}


@pytest.mark.parametrize(
    ("kind", "answer", "expected"),
    [
        ("counting", 2, "2"),
        ("counting", "two", "two"),
        ("ocr", "K7F", "K7F"),
        ("color", ["red", "crimson"], ("red", "crimson")),
        ("box", [0, 1e-5, 1, 0.5], (0.0, 1e-5, 1.0, 0.5)),
        ("box", "[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_answers_are_read_as_their_kind_compares_them(
    kind: str, answer: object, expected: object, tmp_path: Path
) -> None:
    (question,) = read_questions(write(tmp_path / "q.jsonl", {**ROW, "kind": kind, "answer": answer}))
    assert question.answer == expected


def test_question_ids_that_are_spelled_alike_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"more than once: 7"):
        read_questions(write(tmp_path / "q.jsonl", ROW, {**ROW, "question_id": "7"}))


def test_images_outside_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    make_images(tmp_path, "a.png")
    asked = [Question(0, "../a.png", "?", "color", "red")]
    with pytest.raises(ValueError, match=r"1 of 1 images are outside the image folder .*: \.\./a\.png\. Give names"):
        predict(asked, tmp_path / "images", lambda images, prompts: pytest.fail("ran"))


def test_repeated_question_id_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"more than once: 7"):
        read_questions(write(tmp_path / "q.jsonl", ROW, ROW))


def test_predictions_come_back_in_the_order_of_the_questions(tmp_path: Path) -> None:
    make_images(tmp_path, "0.png", "1.png", "2.png")
    asked = [Question(n, f"{n}.png", "?" * length, "color", "red") for n, length in enumerate((1, 5, 3))]
    seen: list[int] = []

    def answer(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        seen.append(len(images))
        return [f"{image.getpixel((0, 0))[0]}{prompt}" for image, prompt in zip(images, prompts, strict=True)]

    rows = predict(asked, tmp_path, answer, batch_size=2)
    assert rows == [
        {"question_id": 0, "prediction": "0?"},
        {"question_id": 1, "prediction": "1?????"},
        {"question_id": 2, "prediction": "2???"},
    ]
    assert seen == [2, 1]


def test_a_model_is_given_one_image_or_a_list(tmp_path: Path) -> None:
    make_images(tmp_path, "0.png", "1.png")
    asked = [Question(n, images, "?", "color", "red") for n, images in enumerate(["0.png", ("0.png", "1.png"), ()])]
    given: list[object] = []

    def answer(images: Sequence[object], prompts: Sequence[str]) -> list[str]:
        given.extend(images)
        return ["red"] * len(prompts)

    predict(asked, tmp_path, answer)
    assert isinstance(given[0], Image.Image)
    assert [len(own) for own in given[1:]] == [2, 0]  # type: ignore[arg-type]


def test_missing_images_are_listed_before_anything_runs(tmp_path: Path) -> None:
    make_images(tmp_path, "0.png")
    asked = [Question(n, f"{n}.png", "?", "color", "red") for n in range(2)]
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are missing in .*: 1\.png\. Give the folder"):
        predict(asked, tmp_path, lambda images, prompts: pytest.fail("ran"))


def test_too_few_answers_are_an_error(tmp_path: Path) -> None:
    make_images(tmp_path, "0.png")
    with pytest.raises(ValueError, match="gave 0 answers to 1 questions"):
        predict([Question(0, "0.png", "?", "color", "red")], tmp_path, lambda images, prompts: [])


def test_batch_size_below_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=0 is too small"):
        predict([], tmp_path, lambda images, prompts: [], batch_size=0)


def test_image_that_is_none_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read"):
        read_image(tmp_path / "text.png")
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"half\.png cannot be read"):
        read_image(tmp_path / "half.png")
