"""MMBench, SEED-Bench, LLaVA-Bench and MM-Vet: prompts, numbers by hand, what servers take, what judges are asked."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from integrations.llava.cli.evaluate import main
from integrations.llava.evaluation import TASKS, Evaluation, Task, check_images, score_predictions
from integrations.llava.evaluation.judge import Judge
from integrations.llava.evaluation.tasks.paper import LlavaBenchTask, MMBenchCnTask, MMBenchTask, MmVetTask

from .judge_server import JudgeServer, judge_server
from .table_fixtures import (
    LETTER,
    WRITERS,
    mmbench_rows,
    write_llava_rules,
    write_mm_vet,
    write_mmbench,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("no_proxy", "*")
    for write in WRITERS.values():
        write(tmp_path)
    return tmp_path


def evaluated(task: Task, folder: Path, said: Mapping[Any, str]) -> Evaluation:
    questions = task.load(folder)
    check_images(questions, folder)
    rows = [{"question_id": own_id, "prediction": text} for own_id, text in said.items()]
    return score_predictions(questions, rows, task=task)


def numbers(evaluation: Evaluation) -> Mapping[str, float]:
    (kind,) = evaluation.kinds.values()
    return kind.scores


# MMBench

RIGHT = {row["index"]: row["answer"] for row in mmbench_rows()}


def test_mmbench_is_asked_as_llava_asks_it(folder: Path) -> None:
    task = MMBenchTask("official")
    asked = task.load(folder)
    assert [own.question_id for own in asked] == [1, 1_000_001, 2, 1_000_002, 2_000_002, 3_000_002, 3]
    prompts = {own.question_id: task.prompt(own) for own in asked}
    assert prompts[1] == f"Which is\nit?\nA. a cat\nB. a dog{LETTER}"
    assert prompts[1_000_001] == f"Which is\nit?\nA. a dog\nB. a cat{LETTER}"
    # "nan" is no hint; "None" ends the options, as pandas has it.
    assert prompts[2] == f"What animal?\nA. cow\nB. horse\nC. hen\nD. goose{LETTER}"
    assert prompts[3] == f'Look closely.\nWho says "hi"?\nA. the man\nB. the boy{LETTER}'
    # Turned questions show the picture of the row that they name.
    assert len({own.image for own in asked}) == 1

    chinese = MMBenchCnTask("official")
    assert chinese.prompt(chinese.load(folder)[0]) == "这是什么?\nA. a cat\nB. a dog\n请直接回答选项字母。"


def test_mmbench_counts_questions_that_are_right_in_every_order(folder: Path) -> None:
    assert numbers(evaluated(MMBenchTask("official"), folder, RIGHT)) == {
        "accuracy": 1.0,
        "logic": 1.0,
        "perception": 1.0,
        "one_order": 1.0,
        "unread": 0.0,
    }
    # One turn of the second is wrong, its first is right; the third names no letter at the end, but its option's text.
    said = {**RIGHT, 2_000_002: "I do not know", 3: "It is the boy"}
    told = numbers(evaluated(MMBenchTask("official"), folder, said))
    assert told == pytest.approx(
        {"accuracy": 2 / 3, "logic": 1.0, "perception": 1 / 2, "one_order": 1.0, "unread": 1 / 7}
    )


def test_a_draw_with_a_question_twice_counts_it_twice(folder: Path) -> None:
    task = MMBenchTask("official")
    answers = evaluated(task, folder, {**RIGHT, 1: "A"}).answers
    first = [own for own in answers if task.unit(own.question) == 1]
    third = [own for own in answers if task.unit(own.question) == 3]
    assert task.aggregate([*first, *first, *third])["accuracy"] == pytest.approx(1 / 3)


def test_mmbench_is_sent_as_the_server_takes_it(folder: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed")
    said = {**RIGHT, 1: "=B", 2: "\x07None"}
    sent = [evaluated(MMBenchTask(), folder, said).submissions["mmbench"]["mmbench.xlsx"] for _ in range(2)]
    assert sent[0] == sent[1]
    sheet = openpyxl.load_workbook(io.BytesIO(sent[0]))["Sheet1"]
    head, *rows = [list(row) for row in sheet.iter_rows(values_only=True)]
    assert head == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert rows[0] == [1, "Which is\nit?", "a cat", "a dog", None, None, "=B", "B", "dev"]
    assert [row[6] for row in rows[1:]] == ["A", "None", "D", "C", "B", "B"]
    assert rows[-1][2:6] == ["the man", "the boy", None, "the girl"]
    with zipfile.ZipFile(io.BytesIO(sent[0])) as archive:
        text = archive.read("xl/worksheets/sheet1.xml").decode()
    assert "<f>" not in text
    ElementTree.fromstring(text)
    assert numbers(evaluated(MMBenchTask(), folder, said)) == {}


def test_mmbench_wants_openpyxl_before_a_model_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("integrations.llava.evaluation.tasks.paper.mmbench.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"openpyxl writes, which is not installed; `pip install 'layerfuse\[excel\]'`"
    ):
        MMBenchTask().load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": "no picture at all, and longer than any index of another row could ever be"},
            "row 2 holds no picture",
        ),
        ({"image": "77"}, r"3 of 7 rows have no picture: 1, 1000001, 3"),
        ({"index": "one"}, "row 2: index is 'one'; get the file anew"),
    ],
)
def test_tables_at_fault_are_named(change: dict[str, str], message: str, folder: Path) -> None:
    path = folder / "mmbench/mmbench_dev_20230712.tsv"
    with path.open(newline="") as file:
        head, *rows = list(csv.reader(file, delimiter="\t"))
    for column, value in change.items():
        rows[0][head.index(column)] = value
        if value == "77":
            rows[-1][head.index(column)] = value
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *rows])
    with pytest.raises(ValueError, match=message):
        MMBenchTask("official").load(folder)


def test_a_table_without_its_columns_or_right_answers(folder: Path) -> None:
    path = folder / "mmbench/mmbench_dev_20230712.tsv"
    limit = csv.field_size_limit()
    text = path.read_text()
    path.write_text(text.replace("dev\n", "test\n").replace("answer", "was"))
    with pytest.raises(ValueError, match=r"question 1 has no right answer in its table; only MMBench's server knows"):
        evaluated(MMBenchTask("official"), folder, RIGHT)
    path.write_text("index\tquestion\n1\twhat\n")
    with pytest.raises(ValueError, match=r"lacks the columns A, B, image; get it anew"):
        MMBenchTask("official").load(folder)
    assert csv.field_size_limit() == limit


def test_the_official_rule_wants_turned_options(folder: Path) -> None:
    path = folder / "mmbench/mmbench_dev_20230712.tsv"
    with path.open(newline="") as file:
        head, *rows = list(csv.reader(file, delimiter="\t"))
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *(row for row in rows if len(row[0]) == 1)])
    with pytest.raises(ValueError, match=r"no question with its options turned \(index of 1,000,000 and more\)"):
        MMBenchTask("official").load(folder)


def test_the_chinese_table_may_lie_in_either_folder(folder: Path) -> None:
    (folder / "mmbench_cn/mmbench_dev_cn_20231003.tsv").unlink()
    write_mmbench(folder, "mmbench/mmbench_dev_cn_20231003.tsv", "cn")
    assert len(MMBenchCnTask("official").load(folder)) == 7


# SEED-Bench


def test_seed_bench_wants_the_letter_and_nothing_else(folder: Path) -> None:
    task = TASKS.get("seedbench")()
    asked = task.load(folder)
    assert task.prompt(asked[0]) == f"Which 11?\nA. a\nB. b\nC. c\nD. d{LETTER}"
    assert asked[0].image == "seed_bench/SEED-Bench-image/1_1"
    said = {11: "A", 12: "B.", 13: "C"}
    told = numbers(evaluated(task, folder, said))
    assert told == pytest.approx(
        {"accuracy": 2 / 3, "image": 0.5, "video": 1.0}
        | {"Scene Understanding": 1.0, "Instance Identity": 0.0, "Action Recognition": 1.0}
    )
    (content,) = evaluated(task, folder, said).submissions["seedbench"].values()
    assert [json.loads(line) for line in content.splitlines()][1] == {"question_id": 12, "prediction": "B."}
    assert numbers(evaluated(TASKS.get("seedbench")("lmms"), folder, said))["accuracy"] == 1.0
    images = evaluated(TASKS.get("seedbench_image")(), folder, {11: "A", 12: "A"})
    assert numbers(images)["accuracy"] == 0.5
    assert images.submissions == {}


def test_seed_bench_files_that_differ_are_counted_and_listed(folder: Path) -> None:
    path = folder / "seed_bench/llava-seed-bench.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1]) + lines[0].replace("11,", "99,", 1))
    message = r"2 questions are not asked \(12, 13\), 1 have no right answer \(99\)\. Give both whole"
    with pytest.raises(ValueError, match=message):
        TASKS.get("seedbench")().load(folder)
    (folder / "seed_bench/SEED-Bench.json").write_text('{"questions": [{}]}')
    with pytest.raises(ValueError, match=r"lacks questions with question_id, answer, data_type, question_type_id"):
        TASKS.get("seedbench")().load(folder)


# Judged


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server(lambda body: "8 6\nFor this reason.") as own:
        yield own


def judge_of(server: JudgeServer, folder: Path) -> Judge:
    return Judge(server.url, "judge", folder / "replies.jsonl", pause=0.001, num_parallel=1)


def test_llava_bench_without_a_judge_is_written_for_the_published_script(folder: Path) -> None:
    evaluation = evaluated(LlavaBenchTask(), folder, {0: "a", 1: "b", 2: "c"})
    assert numbers(evaluation) == {}
    (content,) = evaluation.submissions["llava_bench"].values()
    assert [json.loads(line) for line in content.splitlines()][2] == {
        "question_id": 2,
        "prompt": "What of 2?",
        "text": "c",
        "answer_id": "2",
    }


def test_llava_bench_asks_the_judge_as_published(folder: Path, server: JudgeServer) -> None:
    write_llava_rules(folder)
    ratings = {0: "8 6", 1: "9, 3", 2: "7 7\nboth"}
    server.reply = lambda body: ratings[int(body["messages"][1]["content"].split("What of ")[1][0])]
    task = LlavaBenchTask(judge=judge_of(server, folder))
    evaluation = evaluated(task, folder, {0: "ours 0", 1: "ours 1", 2: "ours 2"})

    # 16 of 24; each category has one question.
    told = numbers(evaluation)
    # Means have three digits, as published: 5.333 / 8.
    assert told == pytest.approx({"score": 100 * 5.333 / 8, "conv": 75, "detail": 100 / 3, "complex": 100}, abs=1e-3)
    assert (task.metric, task.shown_as, task.note) == ("score", "points", "judge judge (judge-2026)")
    request = server.requests[2]
    assert (request["temperature"], request["max_tokens"]) == (0.2, 1024)
    assert request["messages"][0]["role"] == "system"
    assert request["messages"][1]["content"] == (
        "[Context]\nA lake.\nA boat.\n\n[Question]\nWhat of 2?\n\n"
        "[Assistant 1]\nReference 2.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nours 2\n\n[End of Assistant 2]\n\n[System]\nRate complex.\n\n"
    )


def test_llava_bench_asks_again_for_ratings_that_cannot_be_read(folder: Path, server: JudgeServer) -> None:
    replies = iter(["Sorry.", "8\n6", "8 6 7", "8 6"])
    server.reply = lambda body: next(replies, "8 6")
    task = LlavaBenchTask(judge=judge_of(server, folder))
    said = {0: "a", 1: "b", 2: "c"}
    assert numbers(evaluated(task, folder, said))["score"] == pytest.approx(75)
    assert len(server.requests) == 6
    assert task.note == "judge judge (judge-2026), our instruction"
    server.reply = lambda body: "No."
    task = LlavaBenchTask(judge=Judge(server.url, "other", folder / "replies.jsonl"))
    with pytest.raises(ValueError, match=r"judge other rates question 0 in none of 4 replies, the last: 'No\.'"):
        evaluated(task, folder, said)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "questions.jsonl",
            '{"question_id": 1, "text": "a", "image": "000.jpg"}',
            "2 that are answered there .*: 0, 2",
        ),
        (
            "context.jsonl",
            '{"image": "000.jpg", "caption": "a"}',
            "1 of 3 questions lack .*: 2; .*Give the files whole",
        ),
        ("answers_gpt4.jsonl", '{"question_id": 1}', r"answers_gpt4\.jsonl, line 1 lacks question_id or text"),
        ("rule.json", '{"llava_bench_conv": {"prompt": "a"}}', r"has no prompt for llava_bench_detail"),
    ],
)
def test_files_for_a_judge_that_lack_something(
    name: str, content: str, message: str, folder: Path, server: JudgeServer
) -> None:
    (folder / "llava-bench-in-the-wild" / name).write_text(content)
    assert LlavaBenchTask().load(folder)
    with pytest.raises(ValueError, match=message):
        LlavaBenchTask(judge=judge_of(server, folder)).load(folder)


def test_mm_vet_without_a_judge_is_written_for_its_page(folder: Path) -> None:
    evaluation = evaluated(MmVetTask(), folder, {0: "x = -1", 1: "b", 2: "dog"})
    assert numbers(evaluation) == {}
    (content,) = evaluation.submissions["mm_vet"].values()
    assert json.loads(content) == {"v1_0": "x = -1", "v1_1": "b", "v1_2": "dog"}
    (folder / "mm-vet/mm-vet.json").unlink()
    assert len(MmVetTask().load(folder)) == 3


def test_mm_vet_is_graded_by_its_prompt_where_it_is_given(folder: Path, server: JudgeServer) -> None:
    (folder / "mm-vet/judge_prompt.txt").write_text("Question | Ground truth | Prediction | Correctness\n")
    grades = iter(["0.5", "1.0 (right)", "0.0"])
    server.reply = lambda body: next(grades)
    task = MmVetTask(judge=judge_of(server, folder))
    told = numbers(evaluated(task, folder, {0: "x = -1", 1: "b", 2: "dog"}))
    assert told == pytest.approx({"score": 0.5, "ungraded": 0.0, "math": 0.5, "ocr": 0.75, "rec": 0.0})
    assert server.contents[0] == (
        "Question | Ground truth | Prediction | Correctness\n\nWhat is 0? | -1 <AND> -5 | x = -1 | "
    )
    assert server.contents[1].endswith("What is 1? | a <OR> b | b | ")
    assert [(own["temperature"], own["max_tokens"]) for own in server.requests] == [(0, 3)] * 3
    assert task.note == "judge judge (judge-2026)"


def test_mm_vet_asks_again_at_higher_temperatures_and_grades_0_at_last(folder: Path, server: JudgeServer) -> None:
    server.reply = lambda body: "0.8" if "What is 1?" in body["messages"][0]["content"] else "good"
    task = MmVetTask("lmms", judge=judge_of(server, folder))
    assert task.prompt(task.load(folder)[0]).startswith("First please perform reasoning, and think step by step")
    told = numbers(evaluated(task, folder, {0: "a", 1: "b", 2: "c"}))
    assert told["score"] == pytest.approx(0.8 / 3)
    assert told["ungraded"] == pytest.approx(2 / 3)
    assert [own["temperature"] for own in server.requests[:6]] == [0, 0, 0.5, 1.0, 1.5, 2.0]
    assert server.contents[1] == server.contents[0] + "\nPredict the correctness of the answer (digit): "
    assert task.note == "judge judge (judge-2026), our prompt"


def test_mm_vet_without_its_answers(folder: Path, server: JudgeServer) -> None:
    (folder / "mm-vet/mm-vet.json").write_text('{"v1_1": {"answer": "a"}}')
    with pytest.raises(ValueError, match=r"no answer to 2 of 3 questions: v1_0, v1_2; 0 of its own are not asked"):
        MmVetTask(judge=judge_of(server, folder)).load(folder)
    write_mm_vet(folder)
    path = folder / "mm-vet/llava-mm-vet.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match=r"1 of its own are not asked: v1_2\. Give both files whole"):
        MmVetTask(judge=judge_of(server, folder)).load(folder)


# The command


def test_the_command_names_a_judge(folder: Path, server: JudgeServer, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = folder / "out" / "predictions.jsonl"
    predictions.parent.mkdir()
    rows = [{"question_id": own, "prediction": "a"} for own in range(3)]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--predictions", str(predictions), "--task", "llava_bench", "--image-folder", str(folder)]
    judge = ["--judge", server.url, "--judge-model", "judge"]
    for _ in range(2):
        assert main([*command, *judge]) == 0
        told = capsys.readouterr().out
        assert "score 75.000" in told
        assert told.endswith("\nllava_bench: judge judge (judge-2026), our instruction\n")
    assert len(server.requests) == 3
    assert len((folder / "out/judge.jsonl").read_text().splitlines()) == 3
    refused = {
        ("--judge", server.url): "--judge URL and --judge-model NAME go together",
        ("--protocol", "lmms"): "protocol 'lmms' is unknown to LlavaBenchTask; it has: llava",
        (*judge, "--judge-key", "NO_SUCH_KEY"): "environment variable NO_SUCH_KEY is not set",
        (*judge, "--task", "seedbench"): "no judge scores seedbench; leave --judge out, or take llava_bench or mm_vet",
    }
    for options, message in refused.items():
        with pytest.raises(SystemExit, match="2"):
            main([*command, *options])
        assert message in capsys.readouterr().err


def test_the_command_chooses_a_protocol(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = folder / "predictions.jsonl"
    rows = [{"question_id": own, "prediction": letter} for own, letter in RIGHT.items()]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--predictions", str(predictions), "--image-folder", str(folder), "--protocol", "official"]
    assert main([*command, "--task", "mmbench"]) == 0
    assert "100.0 %  logic 1.000" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--questions", "q.jsonl"])
    assert "--protocol and --judge belong to a --task" in capsys.readouterr().err
