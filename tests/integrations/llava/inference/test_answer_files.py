"""Files of questions and answers: checked at the start, continued after an interruption, shared by processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from integrations.llava.cli.generate import main
from integrations.llava.inference.batching import Shard, find_shard, form_batches
from integrations.llava.inference.predictor import Predictor
from integrations.llava.inference.prompt_builder import load_preparer
from integrations.llava.inference.requests import Request, prompt_lengths, read_requests, refuse_broken_images
from integrations.llava.inference.results import AnswerFile, weights_fingerprint
from tests.integrations.llava.inference.answering_parts import PROMPTS
from tests.integrations.llava.tiny_parts import human_and_gpt
from tests.integrations.llava.training.process_pairs import Nursery


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Ten questions of all kinds, in a folder of their own."""
    rows: list[dict[str, Any]] = [
        {"question_id": index, "image": f"{index}.png", "text": text} for index, text in enumerate(PROMPTS[:6])
    ]
    rows += [
        {"id": "none", "prompt": "One?"},
        {"id": "null", "image": None, "prompt": "Two, and three?"},
        {"id": "two", "image": ["6.png", "7.png"], "prompt": "<image> or <image>?"},
        {"id": "talk", "image": "7.png", "conversations": human_and_gpt("<image>\nOne?", "Yes.", "Sure?", "Very.")},
    ]
    return write(tmp_path / "questions.jsonl", rows)


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_file(path: Path, count: int, **options: Any) -> AnswerFile:
    """Answers to `count` questions "q", with ids from 0."""
    settings: dict[str, Any] = {"model_id": "m", "metadata": {}, "shard": Shard()} | options
    requests = [Request(index, (), "q") for index in range(count)]
    return AnswerFile(path, requests, fingerprints=dict.fromkeys(range(count), "f"), **settings)


@pytest.fixture
def ask(run: Path, questions: Path, data_folder: Path) -> Callable[..., int]:
    """The command, with `questions` as its input; it takes the output and further options."""

    def command(output: Path, *more: str, model: Path = run) -> int:
        files = ["--model", model, "--input", questions, "--image-folder", data_folder, "--output", output]
        return main([*map(str, files), "--max-new-tokens", "6", "--batch-size", "3", *more])

    return command


# Questions


def test_rows_of_every_kind_are_read(questions: Path) -> None:
    requests = {request.id: request for request in read_requests(questions)}

    assert list(requests) == [0, 1, 2, 3, 4, 5, "none", "null", "two", "talk"]
    assert requests[1].images == ("1.png",)
    assert requests["none"].images == requests["null"].images == ()
    assert requests["two"].images == ("6.png", "7.png")
    # The answer behind the last question is not shown.
    assert requests["talk"].prompt == human_and_gpt("<image>\nOne?", "Yes.", "Sure?")
    assert requests["talk"].question == "Sure?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "line 2: a list; a question is an object"),
        ({"prompt": "a"}, "line 2: has none of id, question_id"),
        ({"id": 1, "question_id": 1, "prompt": "a"}, "has id and question_id of id, question_id; give one"),
        ({"id": 1}, "has none of prompt, text, conversations"),
        ({"id": 1, "prompt": "a", "text": "b"}, "has prompt and text of"),
        ({"id": 1.5, "prompt": "a"}, "id is 1.5; give a number or a text"),
        ({"id": 1, "prompt": ["a"]}, "prompt is a list; give a text"),
        ({"id": 1, "prompt": "a", "image": {"name": "x"}}, "give a file name, a list of them"),
        ({"id": 1, "prompt": "a", "image": [1]}, "give a file name, a list of them"),
        (
            {"id": 1, "conversations": [{"from": "user", "value": "a"}]},
            "a turn is {'from': 'user', 'value': 'a'}; write",
        ),
        ({"id": 1, "conversations": "a"}, "conversations is a str; give a list of turns"),
        ({"id": 1, "prompt": "half \ud83d"}, "line 2: holds half of a character"),
        ({"id": "\ud83d", "prompt": "a"}, "line 2: holds half of a character"),
        ({"id": 1, "prompt": "a", "images": ["a.png"]}, "has 'images', which is not read; write 'image': "),
        ({"id": 1, "prompt": "a", "image_path": "a.png"}, "has 'image_path', which is not read"),
        ({"id": 1, "conversations": [{"from": "gpt", "value": "a"}]}, "conversations has no question"),
        ({"id": "first", "prompt": "a"}, "line 2: id 'first' was used in line 1"),
        ({"id": 7, "prompt": "a"}, "line 2: id 7 was used in line 1"),
    ],
)
def test_rows_at_fault_are_listed(row: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"id": "7" if row and row.get("id") == 7 else "first", "prompt": "a"}, row])

    with pytest.raises(ValueError, match="1 problems in .*q.jsonl") as error:
        read_requests(path)
    assert message in str(error.value)


def test_a_line_that_is_no_json_is_named_beside_other_problems(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": 1, "prompt": "a"}\n{"id": 2,\n{"id": 3}\n')

    with pytest.raises(ValueError, match="2 problems.*\n.*line 2 is not valid JSON.*\n.*line 3: has none of prompt"):
        read_requests(path)


def test_of_many_problems_twenty_are_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="25 problems(.*\n){21}.*… and 5 more"):
        read_requests(write(tmp_path / "q.jsonl", [{}] * 25))


def test_prompts_the_model_cannot_read_are_listed_by_id(run: Path, tmp_path: Path) -> None:
    requests = [Request("short", (), "a"), Request("long", (), "word " * 900), Request("tags", ("a", "b"), "<image>")]
    with pytest.raises(ValueError, match="2 problems(.*\n)+.*'long': .*512(.*\n)+.*'tags': .*1 <image> tags for 2"):
        prompt_lengths(requests, load_preparer(run), image_folder=tmp_path)


def test_missing_and_broken_images_are_listed_before_the_start(data_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(data_folder, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    requests = [Request(0, ("0.png", "half.png"), "a"), Request(1, ("half.png", "none.png"), "b")]

    with pytest.raises(ValueError, match=r"2 problems in .*\n.*half.png.*cut off.*\n.*none.png: missing"):
        refuse_broken_images(requests, tmp_path)


# Answers


def test_answers_come_in_the_order_of_the_questions(
    ask: Callable[..., int], predictor: Predictor, run: Path, questions: Path, data_folder: Path, tmp_path: Path
) -> None:
    assert ask(tmp_path / "a.jsonl") == 0
    rows = read(tmp_path / "a.jsonl")
    requests = read_requests(questions)
    images = [[Image.open(data_folder / name) for name in request.images] for request in requests]

    assert [row["id"] for row in rows] == [request.id for request in requests]
    assert [row["prompt"] for row in rows] == [request.question for request in requests]
    assert [row["answer"] for row in rows] == predictor(
        images, [request.prompt for request in requests], max_new_tokens=6
    )
    assert {row["model_id"] for row in rows} == {"tiny"}
    assert rows[0]["metadata"] == rows[9]["metadata"]
    assert rows[0]["metadata"] | {"weights": weights_fingerprint(run), "dtype": "float32"} == rows[0]["metadata"]
    assert [path.name for path in tmp_path.glob("a.jsonl*")] == ["a.jsonl"]


def test_sampled_answers_depend_on_neither_batches_nor_processes(ask: Callable[..., int], tmp_path: Path) -> None:
    sampled = ["--temperature", "1", "--seed", "5"]
    ask(tmp_path / "a.jsonl", *sampled)
    ask(tmp_path / "b.jsonl", *sampled, "--batch-size", "8")
    for index in range(3):
        ask(tmp_path / "c.jsonl", *sampled, "--shard", f"{index}/3")

    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.jsonl") == read(tmp_path / "c.jsonl")


class KilledError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def dies_after_two_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the model answer two batches; returns the sizes of all that it was given."""
    sizes: list[int] = []
    whole = Predictor.answer_batch

    def answer_batch(self: Predictor, batch: Any, keys: Any, sampling: Any) -> list[str]:
        if len(sizes) == 2:
            raise KilledError
        sizes.append(len(keys))
        return whole(self, batch, keys, sampling)

    monkeypatch.setattr(Predictor, "answer_batch", answer_batch)
    return sizes


@pytest.fixture
def interrupted(
    ask: Callable[..., int], tmp_path: Path, dies_after_two_batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The output that a process was to write which died after two batches."""
    with pytest.raises(KilledError):
        ask(tmp_path / "a.jsonl")
    monkeypatch.undo()
    return tmp_path / "a.jsonl"


def test_an_interrupted_run_answers_only_what_is_left(
    ask: Callable[..., int], interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = tmp_path.glob("a.jsonl.part-00000-of-00001-*")
    assert not interrupted.exists()
    assert len(read(part)) == 6

    # The last line is half written.
    part.write_bytes(part.read_bytes()[:-20])
    ask(interrupted)
    ask(tmp_path / "whole.jsonl")

    assert read(interrupted) == read(tmp_path / "whole.jsonl")
    assert "5 questions answered; all 10 are in" in capsys.readouterr().err
    ask(interrupted)
    assert "0 questions answered; all 10 are in" in capsys.readouterr().err


def test_a_run_goes_on_with_another_number_of_processes(
    ask: Callable[..., int], interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(interrupted, "--shard", "1/2")
    first = capsys.readouterr().err
    ask(interrupted, "--shard", "0/2")
    ask(tmp_path / "whole.jsonl")

    assert "process 1 of 2: 2 questions answered; 2 are left to other processes" in first
    assert read(interrupted) == read(tmp_path / "whole.jsonl")
    assert not list(tmp_path.glob("a.jsonl.part-*"))


def test_processes_of_torchrun_share_the_questions(
    nursery: Nursery, run: Path, questions: Path, data_folder: Path, ask: Callable[..., int], tmp_path: Path
) -> None:
    command = ["generate", "--model", str(run), "--input", str(questions), "--image-folder", str(data_folder)]
    command += ["--output", str(tmp_path / "a.jsonl"), "--max-new-tokens", "6"]
    ended = nursery.run("distributed_worker:command", command)
    ask(tmp_path / "whole.jsonl")

    assert [each.code for each in ended] == [0, 0], ended
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "whole.jsonl")


def test_new_questions_in_the_file_are_answered_too(ask: Callable[..., int], questions: Path, tmp_path: Path) -> None:
    ask(tmp_path / "a.jsonl")
    before = read(tmp_path / "a.jsonl")
    rows = read(questions)
    write(questions, [{"id": "new", "prompt": "What is new?"}, *rows])
    ask(tmp_path / "a.jsonl")

    assert [row["id"] for row in read(tmp_path / "a.jsonl")][:2] == ["new", 0]
    assert read(tmp_path / "a.jsonl")[1:] == before


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_compiled_model_is_given_batches_of_one_size(
    ask: Callable[..., int],
    questions: Path,
    tmp_path: Path,
    dies_after_two_batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
    workers: str,
) -> None:
    write(questions, read(questions)[:4])
    ask(tmp_path / "a.jsonl", "--compile", "--num-workers", workers)
    monkeypatch.undo()
    ask(tmp_path / "b.jsonl")

    assert dies_after_two_batches == [3, 3]
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.jsonl")


# What is refused


def test_answers_of_other_settings_are_not_mixed(
    ask: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.jsonl"
    ask(output)
    with pytest.raises(SystemExit, match="2"):
        ask(output, "--temperature", "0.5")
    assert "line 1 was answered by another model or under other settings" in capsys.readouterr().err

    assert ask(output, "--temperature", "0.5", "--overwrite") == 0
    assert {row["metadata"]["temperature"] for row in read(output)} == {0.5}


def test_answers_of_another_model_in_the_same_folder_are_not_mixed(
    ask: Callable[..., int], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    assert weights_fingerprint(folder) == weights_fingerprint(run)
    ask(tmp_path / "a.jsonl", model=folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.multi_modal_projector.linear_1.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(SystemExit, match="2"):
        ask(tmp_path / "a.jsonl", model=folder)
    assert "was answered by another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 0}', "is no answer (id, prompt, answer, model_id, metadata)"),
        ('{"id": 9, "prompt": "a", "answer": "b", "metadata": {}}', "answers another question with id 9: 'a'"),
        ('{"id": [0], "prompt": "a", "answer": "b", "metadata": {}}', "is no answer (id, prompt, answer"),
        ('{"id": 0,', "line 1 is not JSON"),
        ("[]", "line 1 is a list; expected one JSON object a line"),
    ],
)
def test_an_output_that_holds_something_else_is_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")

    with pytest.raises(ValueError) as error:
        answer_file(tmp_path / "a.jsonl", 1)
    assert message in str(error.value)


def test_several_processes_do_not_overwrite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several processes cannot overwrite"):
        answer_file(tmp_path / "a", 1, shard=Shard(0, 2), overwrite=True)


def test_shards_are_read_from_text_or_torchruns_environment() -> None:
    assert find_shard("1/4") == Shard(1, 4)
    assert find_shard(None, {"RANK": "2", "WORLD_SIZE": "3"}) == Shard(2, 3)
    assert find_shard(None, {}) == Shard(0, 1)
    for text in ("4/4", "0/0"):
        with pytest.raises(ValueError, match="does not exist; the first of 4 is 0/4"):
            find_shard(text)
    for text in ("1", "a/b", "-1/4"):
        with pytest.raises(ValueError, match="is not of the form INDEX/COUNT"):
            find_shard(text)


def test_batches_hold_like_lengths_and_shards_are_balanced() -> None:
    lengths = [5, 900, 7, 6, 880, 870, 4, 3]

    assert form_batches(lengths, 3, Shard()) == [[1, 4, 5], [2, 3, 0], [6, 7]]
    shares = [form_batches(lengths, 2, Shard(index, 2)) for index in range(2)]
    assert shares == [[[1, 5], [3, 6]], [[4, 2], [0, 7]]]
    assert form_batches([], 2, Shard()) == []
