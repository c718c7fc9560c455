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
