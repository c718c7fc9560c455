"""Data files as sequences: places of samples, memory maps, and the arrays kept beside a file."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import pickle
import tracemalloc
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from integrations.llava.data import (
    SampleFile,
    Selection,
    files,
    read_samples,
    sample_lengths,
    select_samples,
    sidecar,
    source,
)
from integrations.llava.data.index import array_spans, line_spans
from integrations.llava.data.source import file_index
from tests.integrations.llava.tiny_parts import human_and_gpt

SAMPLES = [
    {"id": 1, "image": "a.png", "conversations": human_and_gpt("<image>\nWhat is it?", "A boat.")},
    {"id": "2", "conversations": human_and_gpt("Grüße aus Köln 🚤", "line\u2028break")},
    {"conversations": human_and_gpt("", "")},
]


def mapped(path: Path, content: bytes) -> mmap.mmap:
    path.write_bytes(content)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def as_lines(samples: list[Any]) -> str:
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)


@pytest.fixture
def keep_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Arrays are kept for files of any size; returns the user's cache folder."""
    monkeypatch.setattr(sidecar, "_MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "layerfuse"


def forbid(monkeypatch: pytest.MonkeyPatch, name: str, module: ModuleType = files) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(module, name, fail)


# Reading


def test_json_and_jsonl_hold_the_same_samples(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAMPLES))
    (tmp_path / "b.json").write_text(json.dumps(SAMPLES, indent=3, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(as_lines(SAMPLES) + "\n", encoding="utf-8")

    assert read_samples(tmp_path / "a.json") == read_samples(tmp_path / "a.jsonl") == SAMPLES
    assert list(read_samples(tmp_path / "b.json")) == SAMPLES
    assert read_samples(tmp_path / "a.json") != SAMPLES[:2]


def test_samples_are_a_sequence(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAMPLES))
    samples = read_samples(tmp_path / "a.json")

    assert len(samples) == 3
    assert samples[-1] == SAMPLES[2]
    assert samples[1:] == SAMPLES[1:]
    assert samples.place(2) == "entry 3"
    with pytest.raises(IndexError):
        _ = samples[3]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "is empty"),
        ("a.json", "[]", "holds an empty list"),
        ("a.jsonl", "\n \n", "holds an empty list"),
        ("a.json", "{}", r"holds a dict; it has to be a list .* the ending .jsonl"),
        ("a.json", '"text"', "holds no list"),
        ("a.json", " ", r"the file ends, expected '\['"),
        ("a.json", "[", "the file ends, expected an entry"),
        ("a.json", "[{}", r"the file ends, expected ',' or '\]'"),
        ("a.json", "[{}, {]", r"not valid JSON: .*\(entry 2, byte 5\)"),
        ("a.json", "[{} {}]", "a missing ','"),
        ("a.json", "[{},]", r"a comma before '\]'"),
        ("a.json", "[{}] {}", "more text behind the list"),
        ("a.json", '["\t"]', "Invalid control character"),
    ],
)
def test_a_data_file_that_is_none_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / name)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.json does not exist"):
        read_samples(tmp_path / "nowhere.json")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('["ü"]'.encode("latin-1"))

    with pytest.raises(ValueError, match="no UTF-8"):
        read_samples(tmp_path / "a.json")


def test_a_line_at_fault_is_named_and_the_others_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 0}\n\n{"id": 1\n{"id": 2}\n')
    samples = read_samples(tmp_path / "a.jsonl")

    assert samples[0] == {"id": 0}
    assert samples[2] == {"id": 2}
    with pytest.raises(ValueError, match="line 3 is not valid JSON"):
        _ = samples[1]


def test_lines_may_end_like_on_windows_and_begin_with_a_mark(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"id": 0}\r\n \t\r\n  {"id": 1}'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"id": 0}, {"id": 1}]')

    assert read_samples(tmp_path / "a.jsonl") == read_samples(tmp_path / "a.json") == [{"id": 0}, {"id": 1}]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON_VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 2]), st.booleans())
@example([0.0, -1.5e-7, 2.5e300], 1, None, False)
def test_entries_are_found_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], piece: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "entries.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    spans = array_spans(mapped(path, text), path, piece=piece)

    assert [json.loads(text[start:end]) for start, end, _ in spans] == values
    assert spans[:, 2].tolist() == list(range(1, len(values) + 1))


@given(st.lists(st.sampled_from(["", " ", "\t", "{}", ' "ü"', "\v x"]), min_size=1), st.integers(1, 9))
def test_lines_are_found_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], piece: int
) -> None:
    data = mapped(tmp_path_factory.getbasetemp() / "lines.jsonl", "\n".join([*lines, "last"]).encode())
    spans = line_spans(data, piece=piece)

    wanted = [(line, number) for number, line in enumerate([*lines, "last"], start=1) if line.strip()]
    assert [(data[start:end].decode(), number) for start, end, number in spans] == wanted


def test_opening_a_json_file_takes_a_fraction_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps([{"id": number, "text": "word " * 200} for number in range(2000)])
    (tmp_path / "a.json").write_text(text)
    monkeypatch.setattr(files, "array_spans", partial(array_spans, piece=2**16))
    tracemalloc.start()
    samples = read_samples(tmp_path / "a.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(samples) == 2000
    assert peak < len(text) / 3


# The index beside the file


@pytest.mark.parametrize(("name", "finder"), [("a.json", "array_spans"), ("a.jsonl", "line_spans")])
def test_the_index_is_made_once(
    tmp_path: Path, keep_everything: Path, monkeypatch: pytest.MonkeyPatch, name: str, finder: str
) -> None:
    (tmp_path / name).write_text(json.dumps(SAMPLES) if name == "a.json" else as_lines(SAMPLES), encoding="utf-8")
    read_samples(tmp_path / name)
    forbid(monkeypatch, finder)

    assert read_samples(tmp_path / name) == SAMPLES
    assert sorted(os.listdir(tmp_path)) == [f".{name}.samples-v2.npy", name]


def test_a_changed_file_gets_a_new_index(tmp_path: Path, keep_everything: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 10}\n{"id": 2}\n')
    first = path.stat()
    assert len(read_samples(path)) == 2
    # As many bytes, another content.
    path.write_text('{"id": 1}\n{"id": 22}\n')
    os.utime(path, ns=(first.st_atime_ns, first.st_mtime_ns + 1))

    assert read_samples(path) == [{"id": 1}, {"id": 22}]
    assert path.stat().st_size == first.st_size


@pytest.mark.parametrize("damage", [b"", b"no array", None])
def test_a_damaged_index_is_made_anew(tmp_path: Path, keep_everything: Path, damage: bytes | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(SAMPLES), encoding="utf-8")
    read_samples(path)
    stored = sidecar.sidecar_paths(path, "samples-v2")[0]
    stored.write_bytes(stored.read_bytes()[:-9] if damage is None else damage)

    assert read_samples(path) == SAMPLES
    assert len(np.load(stored)) == 2 + 3 * len(SAMPLES)


def test_read_only_data_have_their_index_in_the_users_cache(
    tmp_path: Path, keep_everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(SAMPLES), encoding="utf-8")
    # A folder of that name cannot be replaced by a file, whoever runs the test.
    sidecar.sidecar_paths(path, "samples-v2")[0].mkdir()
    assert read_samples(path) == SAMPLES
    assert [file.suffix for file in keep_everything.iterdir()] == [".npy"]
    forbid(monkeypatch, "line_spans")

    assert read_samples(path) == SAMPLES


def test_without_any_place_for_it_the_index_stays_in_memory(tmp_path: Path, keep_everything: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(SAMPLES), encoding="utf-8")
    for place in sidecar.sidecar_paths(path, "samples-v2"):
        place.mkdir(parents=True)

    assert read_samples(path) == SAMPLES
    assert not list(tmp_path.rglob("*.part"))


def test_a_small_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAMPLES))
    assert read_samples(tmp_path / "a.json").lengths.tolist() == [6, -6, -1]

    assert os.listdir(tmp_path) == ["a.json"]


def _open_and_read(path: Path) -> list[Any]:
    return list(SampleFile(path))


def test_several_processes_may_make_the_index_at_once(tmp_path: Path, keep_everything: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(SAMPLES))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        read = pool.map(_open_and_read, [path] * 8)

    assert read == [SAMPLES] * 8
    assert sorted(os.listdir(tmp_path)) == [".a.json.samples-v2.npy", "a.json"]


# Copies for workers


def test_a_copy_for_another_process_reads_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAMPLES))
    samples = read_samples(tmp_path / "a.json")
    packed = pickle.dumps(Selection(samples, [2, 0]))

    assert pickle.loads(pickle.dumps(samples)) == SAMPLES
    assert list(pickle.loads(packed)) == [SAMPLES[2], SAMPLES[0]]
    assert len(pickle.dumps(samples)) < 1000


def test_a_file_that_changes_while_it_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAMPLES))
    packed = pickle.dumps(read_samples(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(json.dumps(SAMPLES[:1]))

    with pytest.raises(ValueError, match="was changed while it is in use"):
        pickle.loads(packed)


# Lengths and selections


def read_lengths(path: Path, log: Path, barrier: Any) -> None:
    count = SampleFile._count
    SampleFile._count = lambda self: log.open("a").write("x") and count(self)  # type: ignore[method-assign]
    sidecar._MIN_BYTES = 0
    barrier.wait()
    assert len(read_samples(path).lengths) == 3


def test_of_several_processes_one_counts_lengths(tmp_path: Path, keep_everything: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAMPLES))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [
        context.Process(target=read_lengths, args=(tmp_path / "a.json", tmp_path / "log", barrier)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "x"


def test_lengths_are_counted_where_nothing_can_be_locked(
    tmp_path: Path, keep_everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAMPLES))
    (tmp_path / "none").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))

    assert len(read_samples(tmp_path / "a.json").lengths) == 3


def test_lengths_are_counted_once(tmp_path: Path, keep_everything: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines([*SAMPLES, 5, {"conversations": [1]}]) + "{\n", encoding="utf-8")
    assert read_samples(path).lengths.tolist() == [6, -6, -1, 0, 0, 0]
    forbid(monkeypatch, "count_words", source)

    assert sample_lengths(read_samples(path)).tolist() == [6, -6, -1, 0, 0, 0]


def test_a_selection_knows_lengths_and_places_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAMPLES))
    samples = read_samples(tmp_path / "a.json")
    selected = Selection(Selection(samples, [2, 1, 0]), [0, 2])

    assert list(selected) == selected[:] == [SAMPLES[2], SAMPLES[0]]
    assert sample_lengths(selected).tolist() == sample_lengths([SAMPLES[2], SAMPLES[0]]).tolist() == [-1, 6]
    assert [file_index(selected, position) for position in range(2)] == [2, 0]
    assert select_samples(samples, range(3)) is samples
    assert list(select_samples(samples, [1])) == [SAMPLES[1]]


def test_json_that_python_cannot_hold_is_named(tmp_path: Path) -> None:
    nested, number = "[" * 100_000 + "]" * 100_000, "9" * 5000
    for text in (nested, number):
        lines, entries = tmp_path / "a.jsonl", tmp_path / "a.json"
        lines.write_text(f'{{"conversations": []}}\n{text}\n')
        entries.write_text(f'[{{"conversations": []}}, {text}]')
        samples = SampleFile(lines)
        with pytest.raises(ValueError, match="line 2 is not valid JSON"):
            samples[1]
        assert samples.lengths[1] == 0
        with pytest.raises(ValueError, match=r"is not valid JSON: .*\(entry 2"):
            SampleFile(entries)
