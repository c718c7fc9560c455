"""Files and folders that appear whole or not at all, whatever stops their writer."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerfuse import files
from layerfuse.errors import FileAccessError
from layerfuse.files import (
    atomic_file,
    atomic_folder,
    check_disk_space,
    explain_missing_config,
    file_digest,
    interrupted_save,
    process_is_alive,
    write_text,
)

OLD = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old 1",
    "model-00002-of-00002.safetensors": "old 2",
    "model.safetensors.index.json": "old index",
    "generation_config.json": "old",
    "notes.txt": "the user's",
    "sub/more.txt": "the user's",
}
NEW = {"config.json": "new", "model.safetensors": "new", "generation_config.json": "new", "sub/new.txt": "new"}
# What a dead process of this machine is called: Linux numbers end far below.
DEAD = f"{socket.gethostname()}-999999999-abcdefgh"


def _fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_filled_and_keeps_what_the_model_does_not_replace(tmp_path: Path) -> None:
    _fill(tmp_path, OLD)
    with atomic_folder(tmp_path) as scratch:
        _fill(scratch, NEW)
        assert _content(tmp_path) == OLD | {f"{scratch.name}/{name}": text for name, text in NEW.items()}
    kept = {name: OLD[name] for name in ("notes.txt", "sub/more.txt")}
    assert _content(tmp_path) == NEW | kept
    assert {path.name for path in tmp_path.iterdir()} == {name.partition("/")[0] for name in NEW | kept}


def test_weights_of_other_names_stay_where_no_model_is_written(tmp_path: Path) -> None:
    _fill(tmp_path, OLD)
    with atomic_folder(tmp_path) as scratch:
        _fill(scratch, {"adapter.safetensors": "new"})
    assert _content(tmp_path) == OLD | {"adapter.safetensors": "new"}


def test_nothing_written_changes_nothing(tmp_path: Path) -> None:
    _fill(tmp_path, OLD)
    with atomic_folder(tmp_path):
        pass
    assert _content(tmp_path) == OLD


@pytest.mark.parametrize("folder", ["new", "a/b/new"])
def test_an_error_while_writing_leaves_nothing_behind(folder: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), atomic_folder(tmp_path / folder) as scratch:
        _fill(scratch, NEW)
        raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_the_old_model(tmp_path: Path) -> None:
    _fill(tmp_path, OLD)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path) as scratch:
        _fill(scratch, NEW)
        raise KeyboardInterrupt
    assert _content(tmp_path) == OLD
    assert not list(tmp_path.glob(".*"))


def _break_at(monkeypatch: pytest.MonkeyPatch, function: str, number: int, error: BaseException) -> None:
    real: Callable[..., Any] = getattr(os, function)
    calls = []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(files.os, function, broken)


# 5 files of the old model are put aside (its config, generation config, two shards and their index), 4 new ones move.
@pytest.mark.parametrize("number", range(1, 10))
@pytest.mark.parametrize("error", [OSError(28, "no space"), KeyboardInterrupt()])
def test_an_error_between_two_moves_puts_everything_back(
    number: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(tmp_path, OLD)
    _break_at(monkeypatch, "replace", number, error)
    with pytest.raises(type(error)), atomic_folder(tmp_path) as scratch:
        _fill(scratch, NEW)
    assert _content(tmp_path) == OLD
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_cannot_keep_what_was_written_is_an_error_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(tmp_path, OLD)
    _break_at(monkeypatch, "fsync", 2, OSError(5, "input/output error"))
    with pytest.raises(OSError, match="input/output"), atomic_folder(tmp_path) as scratch:
        _fill(scratch, NEW)
    assert _content(tmp_path) == OLD


def test_a_file_system_without_fsync_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int) -> None:
        raise OSError(22, "invalid argument")

    monkeypatch.setattr(files.os, "fsync", unsupported)
    with atomic_folder(tmp_path) as scratch:
        _fill(scratch, NEW)
    assert _content(tmp_path) == NEW


def _record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is flushed and what is renamed, in order."""
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def note_fsync(descriptor: int) -> None:
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        events.append(f"{Path(source).name} from {_kind(source)} to {_kind(target)}")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", note_fsync)
    monkeypatch.setattr(files.os, "replace", note_replace)
    return events


def _kind(path: Path) -> str:
    return next((kind for kind in ("saving", "replaced") if f".{kind}-" in str(path)), "folder")


linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks /proc what a descriptor is")


@linux
def test_all_content_is_on_the_disk_before_a_name_changes_and_configs_frame_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    _fill(folder, {"config.json": "old", "model.safetensors": "old"})
    events = _record(monkeypatch)
    with atomic_folder(folder) as scratch:
        _fill(scratch, {"config.json": "new", "model.safetensors": "new"})
    out = "config.json from folder to replaced"
    back = "config.json from saving to folder"
    first, last = events.index(out), events.index(back)
    assert sorted(events[:first]) == ["flush config.json", "flush model", "flush model.safetensors"]
    assert events[first + 1 : last] == [
        "flush model",
        "model.safetensors from folder to replaced",
        "model.safetensors from saving to folder",
        "flush model",
    ]
    assert events[last + 1] == "flush model"


@linux
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = _record(monkeypatch)
    write_text(tmp_path / "a.txt", "ä")
    flushed, named = events
    assert flushed == f"flush {named.removesuffix(' from folder to folder')}"
    assert (tmp_path / "a.txt").read_bytes() == "ä".encode()


@linux
def test_a_file_that_need_not_be_on_the_disk_has_its_name_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = _record(monkeypatch)
    with atomic_file(tmp_path / "a.txt", flush=False) as file:
        file.write(b"a")
    assert [event.split()[0] for event in events] != ["flush"] and len(events) == 1
    assert (tmp_path / "a.txt").read_bytes() == b"a"


def test_a_file_that_breaks_off_leaves_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.txt") as file:
        file.write(b"half")
        raise RuntimeError
    assert _content(tmp_path) == {"a.txt": "old"}


def test_a_link_to_a_folder_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as scratch:
        _fill(scratch, NEW)
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "real") == NEW


def test_files_have_the_rights_of_new_ones(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "model") as scratch:
            _fill(scratch, NEW)
            (scratch / "model.safetensors").chmod(0o600)
        with atomic_file(tmp_path / "a") as file:
            file.write(b"a")
    finally:
        os.umask(before)
    for path in (tmp_path / "model" / "model.safetensors", tmp_path / "model" / "sub" / "new.txt", tmp_path / "a"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_folder_that_is_a_file_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    for folder in (tmp_path / "model", tmp_path / "model" / "below"):
        with pytest.raises(FileAccessError, match="model.*give"), atomic_folder(folder):
            pytest.fail("the block ran")
    assert _content(tmp_path) == {"model": "a file"}


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> str:
        raise PermissionError(13, "Permission denied")

    # Root may write anywhere, so rights alone would prove nothing.
    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    message = "nothing can be written into .*new .*Permission denied.*another folder"
    with pytest.raises(FileAccessError, match=message), atomic_folder(tmp_path / "new"):
        pytest.fail("the block ran")
    assert list(tmp_path.iterdir()) == []


def test_scratch_folders_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    live = f".saving-{socket.gethostname()}-{os.getppid()}-abcdefgh"
    elsewhere = ".saving-another.machine-1-abcdefgh"
    odd = f".saving-{socket.gethostname()}-x-abcdefgh"
    for name in (f".saving-{DEAD}", live, elsewhere, odd):
        _fill(tmp_path, {f"{name}/model.safetensors": "half"})
    with atomic_folder(tmp_path) as scratch:
        _fill(scratch, NEW)
    assert {path.name for path in tmp_path.glob(".*")} == {live, elsewhere, odd}


def test_what_was_put_aside_stays_until_it_is_written_anew(tmp_path: Path) -> None:
    _fill(tmp_path, {f".replaced-{DEAD}/config.json": "old", f".replaced-{DEAD}/model-00001-of-00002.safetensors": "1"})
    with atomic_folder(tmp_path) as scratch:
        _fill(scratch, {"adapter.safetensors": "no model"})
    assert interrupted_save(tmp_path) == tmp_path / f".replaced-{DEAD}"
    with atomic_folder(tmp_path) as scratch:
        _fill(scratch, NEW)
    assert interrupted_save(tmp_path) is None
    assert not list(tmp_path.glob(".*"))


def test_a_killed_save_is_told_with_where_the_earlier_model_lies(tmp_path: Path) -> None:
    assert explain_missing_config(tmp_path) == ""
    assert explain_missing_config(tmp_path / "nowhere") == ""
    (tmp_path / f".saving-{DEAD}").mkdir()
    (tmp_path / f".replaced-{DEAD}").mkdir()
    assert explain_missing_config(tmp_path) == " A save into this folder was killed half-way: save again."
    _fill(tmp_path, {f".replaced-{DEAD}/config.json": "old"})
    assert f"or move the earlier model's files back from .replaced-{DEAD}." in explain_missing_config(tmp_path)


def test_what_killed_writers_left_of_a_file_goes_with_its_next_writing_and_that_of_others_stays(tmp_path: Path) -> None:
    work = "import os, signal, sys; from pathlib import Path; from layerfuse.files import atomic_file"
    work += "\nwith atomic_file(Path('a.json')) as file: file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", work], cwd=tmp_path, stdout=subprocess.PIPE).returncode
    assert len(list(tmp_path.glob(".a.json.*.part"))) == 2
    host = socket.gethostname()
    kept = {f".a.json.{host}-{os.getppid()}-0.part", ".a.json.elsewhere-1-0.part", f".b.a.json.{DEAD}.part"}
    for name in kept:
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "a.json") as file:
        file.write(b"whole")
    assert len(list(tmp_path.glob(".a.json.*.part"))) == 4
    write_text(tmp_path / "a.json", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *kept}


def test_a_process_is_alive_until_it_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process_is_alive(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not process_is_alive(process.pid)
    assert process_is_alive(1)


def test_a_process_that_may_not_be_asked_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(files.os, "kill", refuse)
    assert process_is_alive(12345)


def test_room_is_looked_for_in_the_nearest_existing_folder(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "not" / "there", 1, "a file")
    with pytest.raises(FileAccessError, match="a checkpoint needs .* GiB, but the disk of .* has .* GiB left"):
        check_disk_space(tmp_path / "not" / "there", 2**60, "a checkpoint")


def test_a_digest_is_of_all_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "long").write_bytes(b"a" * (2**23 + 1))

    # FIPS 180-2, B.1; the other as Python's whole-file hash has it.
    assert file_digest(tmp_path / "abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "long") == hashlib.sha256(b"a" * (2**23 + 1)).digest()
