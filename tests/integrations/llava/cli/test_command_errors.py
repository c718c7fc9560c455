"""Commands print what a user caused in one line, and leave every other error its traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.cli import convert as convert_command
from integrations.llava.cli import data as data_command
from tests.integrations.llava.tiny_parts import human_and_gpt


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data file of one sample without image."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "1", "conversations": human_and_gpt("What?", "This.")}]))
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--data", "{data}", "--image-folder", "{folder}", "--report", "{data}/report.json"],
        ["convert", "--data", "{data}", "--output", "{data}/data.jsonl"],
    ],
)
def test_data_tries_the_place_of_its_result_before_it_reads(
    arguments: list[str], data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "check":
        monkeypatch.setattr(data_command, "read_samples", lambda *_, **__: pytest.fail("data were read"))

    with pytest.raises(SystemExit, match="2"):
        data_command.main([given.format(data=data, folder=data.parent) for given in arguments])
    assert "cannot be written (Not a directory); give another file" in capsys.readouterr().err


def test_convert_names_a_processor_that_cannot_be_loaded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "tokenizer.json").unlink()

    with pytest.raises(SystemExit, match="2"):
        convert_command.main(["--from", str(folder), "--to", str(tmp_path / "to")])
    assert "the processor of" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
def test_real_errors_of_data_and_convert_keep_their_traceback(
    error: type[Exception], data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("of the program")

    monkeypatch.setattr(data_command, "survey_samples", fail)
    monkeypatch.setattr(convert_command, "convert", fail)
    with pytest.raises(error, match="of the program"):
        data_command.main(["check", "--data", str(data), "--image-folder", str(tmp_path)])
    with pytest.raises(error, match="of the program"):
        convert_command.main(["--from", str(run), "--to", str(tmp_path / "to")])
