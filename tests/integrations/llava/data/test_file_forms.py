"""Data files with one sample a line, or with a list: the content says which, whatever a file is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.cli import data as data_command
from integrations.llava.data import read_samples
from tests.integrations.llava.tiny_parts import human_and_gpt

SAMPLES: list[Any] = [
    {"id": 1, "image": "a.png", "conversations": human_and_gpt("<image>\nWhat is it?", "A boat.")},
    {"id": "2", "conversations": human_and_gpt("Grüße aus Köln 🚤", "line\u2028break")},
]


def as_lines(samples: list[Any]) -> str:
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)


@pytest.mark.parametrize("mark", ["", "\ufeff", " \r\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_are_read_whatever_they_are_called(tmp_path: Path, mark: str, end: str) -> None:
    forms = [json.dumps(SAMPLES), json.dumps(SAMPLES, indent=2), as_lines(SAMPLES)]
    for name in ("a.json", "a.jsonl", "a"):
        for form in forms:
            (tmp_path / name).write_text(mark + form.replace("\n", end), encoding="utf-8", newline="")
            samples = read_samples(tmp_path / name)
            assert samples == SAMPLES
            assert samples.has_lines == (form == forms[2])


def test_a_line_that_is_a_list_is_one_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1]\n" + as_lines(SAMPLES), encoding="utf-8")

    assert read_samples(tmp_path / "a.jsonl")[1:] == SAMPLES


def test_samples_over_several_lines_are_said_once(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(sample, indent=2) for sample in SAMPLES))
        with pytest.raises(ValueError, match="samples that are written over several lines, and is no list; write one"):
            read_samples(tmp_path / name)


def test_a_share_is_checked_by_the_samples_that_training_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(index), "conversations": human_and_gpt("a", "b")} for index in range(4)]
    rows[2]["conversations"] = []
    (tmp_path / "data.json").write_text(json.dumps(rows))
    half = f"{tmp_path / 'data.json'}:0.5"
    command, found = ["check", "--data", half, "--image-folder", str(tmp_path)], {}
    for seed in range(6):
        has_fault = "2" in [sample["id"] for sample in read_samples(half, seed=seed)]
        assert data_command.main([*command, "--seed", str(seed)]) == int(has_fault)
        found[has_fault] = seed
    assert len(found) == 2
    capsys.readouterr()
