"""A judge behind an endpoint: what it is sent, that replies are kept, and what happens when it fails."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.evaluation.judge import Judge, JudgeError
from integrations.llava.evaluation.judged import JudgedTask
from integrations.llava.evaluation.scores import score_predictions
from integrations.llava.evaluation.task import Question
from tests.integrations.llava.evaluation.judge_server import JudgeServer, failure, judge_server, turns


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server(lambda body: f"you said {body['messages'][-1]['content']}") as own:
        yield own


def judge_of(server: JudgeServer, folder: Path, **options: Any) -> Judge:
    return Judge(server.url, "judge", folder / "replies.jsonl", pause=0.001, **options)


def test_a_request_is_what_the_endpoint_takes(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", " secret\n")
    judge = Judge(server.url + "/", "judge", tmp_path / "a/b.jsonl", key_variable="MY_KEY", options={"seed": 3})
    assert judge.ask(turns("h\u00e9llo"), temperature=0.2, max_tokens=9) == "you said h\u00e9llo"
    assert server.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "judge",
            "messages": [{"role": "user", "content": "h\u00e9llo"}],
            "temperature": 0.2,
            "max_tokens": 9,
            "seed": 3,
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.headers[0]["Content-Type"] == "application/json"
    assert "secret" not in (tmp_path / "a/b.jsonl").read_text()
    assert judge.name == "judge (judge-2026)"


def test_a_server_of_ones_own_gets_no_key_and_options_leave_out_what_it_does_not_take(
    server: JudgeServer, tmp_path: Path
) -> None:
    server.served = "judge"
    judge = judge_of(server, tmp_path, options={"max_tokens": None, "max_completion_tokens": 50, "temperature": None})
    judge.ask(turns("a"), temperature=0.2, max_tokens=9)
    assert set(server.requests[0]) == {"path", "model", "messages", "max_completion_tokens"}
    assert "Authorization" not in server.headers[0]
    assert judge.name == "judge"


def test_replies_are_kept_and_tell_requests_apart(server: JudgeServer, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path)
    for _ in range(2):
        assert judge.ask(turns("a"), temperature=0, max_tokens=9) == "you said a"
    judge.ask(turns("a"), temperature=0, max_tokens=9, attempt=1)
    judge.ask(turns("a"), temperature=0.5, max_tokens=9)
    judge.ask(turns("a"), temperature=0, max_tokens=8)
    judge.ask(turns("b"), temperature=0, max_tokens=9)
    assert len(server.requests) == 5

    again = judge_of(server, tmp_path)
    assert again.ask(turns("a"), temperature=0, max_tokens=9) == "you said a"
    assert (len(server.requests), again.name) == (5, "judge (judge-2026)")
    other = Judge(server.url, "other", tmp_path / "replies.jsonl")
    server.served = "other-1"
    other.ask(turns("a"), temperature=0, max_tokens=9)
    assert (len(server.requests), other.name) == (6, "other (other-1)")


def test_a_reply_that_a_killed_process_left_half_written_is_asked_again(server: JudgeServer, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path)
    for text in ("a", "b"):
        judge.ask(turns(text), temperature=0, max_tokens=9)
    path = tmp_path / "replies.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again = judge_of(server, tmp_path)
    for text in ("a", "b"):
        assert again.ask(turns(text), temperature=0, max_tokens=9) == f"you said {text}"
    assert len(server.requests) == 3
    assert [json.loads(line)["reply"] for line in path.read_text().splitlines()] == ["you said a", "you said b"]
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"replies\.jsonl, line 1 is no reply of a judge; move the file away"):
        judge_of(server, tmp_path)


EMPTY = {"model": "m", "choices": [{"message": {"content": ""}, "finish_reason": "length"}]}


@pytest.mark.parametrize(
    "fault",
    [
        failure(500),
        failure(429, Retry_After="0"),
        failure(503, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"),
        failure(200, "no JSON"),
        failure(200, '{"choices": []}'),
        (200, {}, EMPTY),
        (200, {"Content-Length": "900"}, b"short"),
        "hang up",
    ],
)
def test_failures_that_pass_are_tried_again(fault: Any, server: JudgeServer, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path, timeout=5)
    server.faults = [fault, fault]
    assert judge.ask(turns("a"), temperature=0, max_tokens=9) == "you said a"
    assert len(server.requests) == 3


def test_a_judge_that_keeps_failing_is_an_error_that_tells_why(server: JudgeServer, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path, num_tries=2)
    server.faults = [failure(500, "out of order")] * 2
    with pytest.raises(JudgeError, match=r"no reply in 2 tries \(500 .*: out of order\)\. Replies so far are kept"):
        judge.ask(turns("a"), temperature=0, max_tokens=9)
    server.faults = [(200, {}, EMPTY)] * 2
    with pytest.raises(OSError, match="an empty reply, finish_reason 'length'; a judge that thinks first needs more"):
        judge.ask(turns("a"), temperature=0, max_tokens=9)
    assert (tmp_path / "replies.jsonl").read_text() == ""


def test_a_refusal_is_told_at_once_without_the_key(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    judge = judge_of(server, tmp_path, key_variable="MY_KEY")
    server.faults = [failure(401, "wrong key secret")]
    with pytest.raises(JudgeError, match=r"refuses a request \(401 .*: wrong key …\); mend its name, address, key"):
        judge.ask(turns("a"), temperature=0, max_tokens=9)
    # The key goes to no other address.
    server.faults = [failure(307, "", Location=server.url)]
    with pytest.raises(JudgeError, match=r"refuses a request \(307"):
        judge.ask(turns("a"), temperature=0, max_tokens=9)
    assert len(server.requests) == 2


def test_an_address_where_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        judge = Judge(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", "m", tmp_path / "r", num_tries=2, pause=0.001)
        with pytest.raises(JudgeError, match=r"gave no reply in 2 tries"):
            judge.ask(turns("a"), temperature=0, max_tokens=9)


def test_what_cannot_work_is_refused_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="address is 'file:///etc/passwd'; give one that begins with https"):
        Judge("file:///etc/passwd", "m", tmp_path / "r")
    with pytest.raises(ValueError, match="num_tries is 0 and num_parallel 4; give at least 1"):
        Judge("http://a", "m", tmp_path / "r", num_tries=0)
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable MY_KEY is not set"):
        Judge("http://a", "m", tmp_path / "r", key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", "a\nb")
    with pytest.raises(ValueError, match="MY_KEY holds characters that no key has"):
        Judge("http://a", "m", tmp_path / "r", key_variable="MY_KEY")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written .*the judge's replies are kept there"):
        Judge("http://a", "m", tmp_path / "file" / "r")


class Length(JudgedTask):
    """As long as the judge says."""

    def judged(self, answer: str, question: Question, judge: Judge) -> Mapping[str, float]:
        return {"length": float(len(judge.ask(turns(answer), temperature=0, max_tokens=9)))}


def test_a_task_is_scored_by_its_judge_several_answers_at_a_time(server: JudgeServer, tmp_path: Path) -> None:
    questions = [Question(n, (), "?", "length") for n in range(9)]
    rows = [{"question_id": n, "prediction": "x" * n} for n in range(9)]
    server.faults = [failure(500), None, "hang up", None, failure(429)]
    task = Length(judge=judge_of(server, tmp_path, num_parallel=3))
    evaluation = score_predictions(questions, rows, task=task)
    assert [own.scores["length"] for own in evaluation.answers] == [n + len("you said ") for n in range(9)]
    assert evaluation.kinds["length"].scores["length"] == 4 + len("you said ")
    assert (task.note, len(server.requests)) == ("judge judge (judge-2026)", 12)

    assert score_predictions(questions, rows, task=Length(judge=judge_of(server, tmp_path))).answers
    assert len(server.requests) == 12
    alone = Length()
    assert (alone.note, score_predictions(questions, rows, task=alone).kinds["length"].scores) == ("", {})


def test_an_evaluation_that_a_judge_broke_off_goes_on(server: JudgeServer, tmp_path: Path) -> None:
    questions = [Question(n, (), "?", "length") for n in range(6)]
    rows = [{"question_id": n, "prediction": "x" * n} for n in range(6)]
    server.faults = [None, None, None, failure(403)]
    with pytest.raises(JudgeError, match="refuses a request"):
        score_predictions(questions, rows, task=Length(judge=judge_of(server, tmp_path, num_parallel=1)))
    score_predictions(questions, rows, task=Length(judge=judge_of(server, tmp_path, num_parallel=1)))
    assert all(server.contents.count("x" * n) <= 2 for n in range(6))
    assert [server.contents.count("x" * n) for n in range(3)] == [1, 1, 1]
