"""The reader of JSON-lines files: what ends a line, and what a fault is told with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integrations.llava._files import is_writable_text, json_lines

BREAKS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e"


def test_a_line_ends_at_the_newline_only(tmp_path: Path) -> None:
    rows = [{"a": f"one {BREAKS} two"}, {"b": BREAKS}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")

    assert list(json_lines(path)) == [(1, rows[0]), (2, rows[1])]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')

    assert list(json_lines(path)) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON"),
        (b'{"a": "\xff"}', "line 2 is not JSON .*utf-8"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b"[1]", "line 2 is a list; expected one JSON object"),
        (rb'{"a": "\ud83d"}', "line 2 holds half of a character"),
    ],
)
def test_a_fault_is_told_with_file_and_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")

    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
        list(json_lines(path))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
        list(json_lines(path, growing=True))


def test_of_a_growing_file_a_last_line_that_is_half_written_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert [row for _, row in json_lines(path, growing=True)] == [{"a": 1}, {"a": 2}]
    path.write_bytes('{"a": 1}\n{"a": "é'.encode()[:-1])
    assert [row for _, row in json_lines(path, growing=True)] == [{"a": 1}]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot be read .*; give a file"):
        list(json_lines(tmp_path))


def test_halves_of_a_character_cannot_be_written() -> None:
    assert is_writable_text({"a": ["😀", 1, None]})
    assert not is_writable_text({"a": ["\ud83d"]})
