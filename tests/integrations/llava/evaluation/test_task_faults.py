"""The contract of all registered tasks, and what is said of one that breaks it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from integrations.llava.evaluation import TASKS, Question, ScoredAnswer, Task, task_faults
from tests.integrations.llava.evaluation.make_fixtures import write_data


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All benchmarks that need no further package; nobody writes to it."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_data(folder, parquet=False)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Benchmarks that are parquet or sent as Excel tables, where pyarrow and openpyxl are installed."""
    if find_spec("pyarrow") is None or find_spec("openpyxl") is None:
        return None
    folder = tmp_path_factory.mktemp("parquet")
    write_data(folder)
    return folder


@pytest.mark.parametrize("name", TASKS.names())
def test_every_task_keeps_the_contract(name: str, benchmarks: Path, parquet: Path | None, tmp_path: Path) -> None:
    needs = TASKS.get(name)().needs()
    if needs[-1].path == "images":  # a kind of question of one's own
        answer = {"box": [0.1, 0.1, 0.4, 0.4], "counting": 3, "multiple_choice": "B", "number": 2.5, "yes_no": "no"}
        row = {"question_id": 0, "image": "a.png", "text": "?", "kind": name, "answer": answer.get(name, "ring")}
        (tmp_path / needs[0].path).write_text(json.dumps(row) + "\n")
        (tmp_path / "images").mkdir()
        (tmp_path / "images/a.png").touch()
        folder: Path | None = tmp_path
    elif any(own.path.endswith((".parquet", ".tsv")) for own in needs):
        folder = parquet
    else:
        folder = benchmarks
    assert task_faults(name, folder) == []


class Broken(Task):
    """Knows no title, asks nothing, and sums up to no number."""

    metric = "score"

    def load(self, folder: str | Path) -> list[Question]:
        return [Question(1, (), " ", "broken", "a"), Question(2, (), "b", "broken", "b")]

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        return {"accuracy": float("nan")}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        return {"accuracy": float("nan")}


def test_faults_of_a_task_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS._entries, "broken", Broken)
    faults = task_faults("broken", tmp_path)
    assert faults[:3] == [
        "has no title, or no source",
        "llava: loads questions from an empty folder",
        "llava: has an empty prompt without an image",
    ]
    assert "llava: sums up the answer 'A' to accuracy=nan, accuracy=nan" in faults
    assert "llava: has neither 'score' nor a file for a server" in faults
