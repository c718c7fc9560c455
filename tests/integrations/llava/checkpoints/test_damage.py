"""Sources that are damaged, targets that are in use, conversions that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from integrations.llava.checkpoints import convert, convert_connector, layout_of
from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.cli.convert import main
from layerfuse.errors import UserError
from tests.killed_saver import die_at_rename

DAMAGE = {"nothing": b"", "half": None, "a list": b"[]", "another encoding": b'{"\xe9": 1}'}


@pytest.fixture(scope="module")
def sources(mmfuser_folder: Path, llava_hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of checkpoints in three layouts, for the tests to damage and to mend."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(mmfuser_folder.parent, folder / "published")
    shutil.copytree(llava_hf_folder, folder / "hf")
    return {
        "mmfuser": folder / "published" / mmfuser_folder.name,
        "llava-hf": folder / "hf",
        "layerfuse": convert(mmfuser_folder, folder / "ours"),
    }


def refused(source: Path, file: str, content: bytes, target: Path) -> str:
    """What is said of a source in which one file has another content; the target must not appear."""
    kept = (source / file).read_bytes()
    (source / file).write_bytes(content)
    try:
        with pytest.raises(UserError) as error:
            convert(source, target)
    finally:
        (source / file).write_bytes(kept)
    assert not target.parent.exists()
    return str(error.value)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("mmfuser", "config.json"),
        ("mmfuser", "tokenizer.json"),
        ("mmfuser", "tokenizer_config.json"),
        ("llava-hf", "config.json"),
        ("llava-hf", "preprocessor_config.json"),
        ("layerfuse", "config.json"),
        ("layerfuse", "processor_config.json"),
        ("layerfuse", "generation_config.json"),
    ],
)
def test_a_damaged_file_is_named_and_leaves_no_folder(
    layout: str, file: str, damage: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[layout]
    whole = (source / file).read_bytes()
    content = DAMAGE[damage]
    said = refused(source, file, whole[: len(whole) // 2] if content is None else content, tmp_path / "new" / "target")
    assert str(source / file) in said


@pytest.mark.parametrize(
    ("layout", "file", "changes", "message"),
    [
        ("mmfuser", "config.json", {"hidden_size": "x"}, "the config of .* cannot be read: .*hidden_size"),
        ("mmfuser", "config.json", {"hidden_act": "x"}, "the language model's config cannot be read: KeyError: 'x'"),
        ("mmfuser", "config.json", {"rope_scaling": -1}, "the config of .* cannot be read: TypeError"),
        ("mmfuser", "config.json", {"mm_vision_tower": None}, "mm_vision_tower is None, can be a name or folder"),
        (
            "mmfuser",
            "config.json",
            {"mm_vision_select_layer": None},
            "mm_vision_select_layer is None; expected 5 layers",
        ),
        ("mmfuser", "tokenizer_config.json", {"bos_token": 1}, "the tokenizer of .* cannot be read: TypeError"),
        ("llava-hf", "config.json", {"text_config": -1}, "the config of .* cannot be read"),
        ("layerfuse", "config.json", {"fuser": None}, "the config of .* describes no backbone and fuser"),
        ("layerfuse", "config.json", {"image_seq_length": "x"}, "the config of .* cannot be read"),
        ("layerfuse", "config.json", {"prompt_template": {"nme": "v1"}}, "the prompt_template is .*, which is none"),
        ("layerfuse", "processor_config.json", {"image_processor": None}, "the processor of .* cannot be read"),
    ],
)
def test_a_value_that_no_library_takes_is_told_in_a_sentence(
    layout: str, file: str, changes: dict[str, Any], message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    content = json.loads((sources[layout] / file).read_text()) | changes
    said = refused(sources[layout], file, json.dumps(content).encode(), tmp_path / "new" / "target")
    assert re.search(message, said), said


def test_a_model_of_another_kind_is_never_replaced(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "theirs"
    shutil.copytree(sources["llava-hf"], target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    for source in (sources["mmfuser"], target):
        with pytest.raises(SystemExit, match="2"):
            main(["--from", str(source), "--to", str(target)])
        assert "already holds" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_target_inside_the_source_leaves_the_source_as_it_was(sources: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "ours"
    shutil.copytree(sources["layerfuse"], source)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    target = convert(source, source / "published", "mmfuser")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert layout_of(source) == "layerfuse" and layout_of(target) == "mmfuser"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_target_that_is_a_file_is_refused(place: str, sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for convert_it in (convert, convert_connector):
        with pytest.raises(UserError, match="file is a file, so .* cannot be a folder"):
            convert_it(sources["mmfuser"], tmp_path / place)


def test_an_adapter_is_never_replaced(sources: dict[str, Path], tmp_path: Path) -> None:
    for layout, name in (("layerfuse", "adapter.safetensors"), ("mmfuser", "mm_projector.bin")):
        written = convert_connector(sources["mmfuser"], tmp_path / layout, layout)
        before = written.read_bytes()
        with pytest.raises(UserError, match=f"{name} exists already; give another folder"):
            convert_connector(sources["layerfuse"], tmp_path / layout, layout)
        assert written.read_bytes() == before


def test_an_adapter_that_is_refused_leaves_no_folder(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a fuser, so its connector has the layout 'mmfuser'"):
        convert_connector(sources["layerfuse"], tmp_path / "new" / "target", "llava")
    assert not (tmp_path / "new").exists()


def converted_until(source: Path, target: Path, kill_at: int) -> None:
    """Convert in a process that kills itself at its rename of that number."""
    die_at_rename(kill_at)
    convert(source, target)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed")
def test_a_conversion_that_is_killed_leaves_nothing_that_loads_and_does_not_stand_in_the_way(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    expected = load_file(sources["layerfuse"] / "model.safetensors")
    half_way = 0
    for kill_at in range(100):
        target = tmp_path / f"{kill_at}"
        process = multiprocessing.get_context("fork").Process(
            target=converted_until, args=(sources["mmfuser"], target, kill_at)
        )
        process.start()
        process.join()
        if not (target / "config.json").is_file():
            half_way += any(not path.name.startswith(".") for path in target.iterdir())
            convert(sources["mmfuser"], target)
            assert not list(target.glob(".saving-*"))
        assert load_file(target / "model.safetensors").keys() == expected.keys()
        assert load_model(target) is not None
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and half_way > 2
