"""Files of weights: read one tensor at a time, refused if they hold more, written in shards."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from integrations.llava.checkpoints.tensors import (
    StoredTensor,
    check_fit,
    read_json,
    stored_model,
    stored_tensors,
    write_sharded,
)
from layerfuse.errors import UserError
from layerfuse.files import atomic_folder
from tests.integrations.llava.tiny_parts import RunsCode

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}


@pytest.mark.parametrize("zipped", [True, False], ids=["today's", "of PyTorch before 1.6"])
def test_bin_files_of_all_ages_are_read(zipped: bool, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    stored = stored_model(tmp_path)
    for name, tensor in TENSORS.items():
        assert (stored[name].shape, stored[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(stored[name].read(), tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_safetensors_of_every_type_are_described_without_being_read(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 5).to(dtype)}, tmp_path / "x.safetensors")
    stored = stored_tensors(tmp_path / "x.safetensors")["a"]
    assert (stored.shape, stored.dtype, stored.num_bytes) == ((2, 5), dtype, 10 * dtype.itemsize)
    assert stored.read().dtype == dtype


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    content = {**TENSORS, "extra": RunsCode(tmp_path / "was run")}
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="holds more than tensors: Python objects, .* nothing was run"):
        stored_tensors(tmp_path / "x.bin")
    assert not (tmp_path / "was run").exists()


def no_pickle(file: Path, kind: str) -> None:
    """Write a file that torch.load refuses with advice to read it as code."""
    if kind == "TorchScript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(file))
    elif kind == "tar":
        (file.parent / "storages").write_bytes(b"")
        with tarfile.open(file, "w") as archive:
            archive.add(file.parent / "storages", "storages")
    else:
        file.write_bytes({"page": b"<!DOCTYPE html>\n", "pointer": b"version https://git-lfs\n"}[kind])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", ["page", "pointer", "TorchScript", "tar"])
def test_what_is_no_pickle_is_told_as_that_and_never_as_something_to_trust(kind: str, tmp_path: Path) -> None:
    no_pickle(tmp_path / "x.bin", kind)
    with pytest.raises(
        ValueError, match=r"x\.bin is not a whole file of weights \(it holds no pickle of tensors, or is damaged\); "
    ) as error:
        stored_tensors(tmp_path / "x.bin")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(("content", "named"), [({**TENSORS, "epoch": 3}, "epoch"), ([torch.ones(1)], "list")])
def test_more_than_named_tensors_is_refused(content: Any, named: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=f"holds more than named tensors: {named}"):
        stored_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_damaged_file_is_named(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x.{suffix}"
    if suffix == "bin":
        torch.save(TENSORS, file)
    else:
        save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"x.{suffix} is not a whole .* download or write it anew"):
        stored_tensors(file)


def test_a_pickle_cut_off_anywhere_is_told_as_damage(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "whole.bin", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "whole.bin").read_bytes()
    told = []
    for length in range(len(whole)):
        (tmp_path / "x.bin").write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"x\.bin (is not a whole file of weights|holds more than tensors)"
        ) as caught:
            stored_tensors(tmp_path / "x.bin")
        told.append("not a whole file" in str(caught.value))
    # Cut within the name of a class, a file names another class, which nobody can tell from code.
    assert sum(told) > 0.8 * len(whole)


def test_a_pickle_with_wrong_bytes_anywhere_is_read_or_told_as_damage(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "whole.bin", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "whole.bin").read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        (tmp_path / "x.bin").write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        try:
            stored_tensors(tmp_path / "x.bin")
        except UserError as error:
            refused += "x.bin" in str(error) and "weights_only" not in str(error)
    assert refused > len(whole) / 9


def write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_that_are_missing_lacking_or_elsewhere_are_refused(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(FileNotFoundError, match="lacks the shards two.safetensors"):
        stored_model(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(ValueError, match="lack what model.safetensors.index.json says they hold: b"):
        stored_model(tmp_path)
    write_index(tmp_path, {"a": "../one.safetensors"})
    with pytest.raises(ValueError, match="names ../one.safetensors; shards are files beside it"):
        stored_model(tmp_path)
    write_index(tmp_path, {})
    with pytest.raises(ValueError, match="names no shards"):
        stored_model(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights; expected model.safetensors or pytorch_model.bin"):
        stored_model(tmp_path)


def test_shards_have_the_size_asked_for_and_keep_the_order(tmp_path: Path) -> None:
    tensors = {f"t{number}": StoredTensor.of(torch.full((4,), float(number))) for number in range(10)}
    write_sharded(tensors, tmp_path, shard_bytes=48)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert [len(load_file(shard)) for shard in shards] == [3, 3, 3, 1]
    assert list(load_file(shards[0])) == ["t0", "t1", "t2"]
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 160 and len(index["weight_map"]) == 10
    assert stored_model(tmp_path).keys() == tensors.keys()


def test_a_number_of_shards_can_be_asked_for(tmp_path: Path) -> None:
    tensors = {f"t{number}": StoredTensor.of(torch.full((4,), float(number))) for number in range(10)}
    write_sharded(tensors, tmp_path, num_shards=3)
    assert [len(load_file(shard)) for shard in sorted(tmp_path.glob("model-*.safetensors"))] == [4, 3, 3]


def test_tensors_are_changed_when_they_are_read() -> None:
    reads = []
    stored = StoredTensor((2,), torch.float32, lambda: reads.append(1) or torch.ones(2))
    doubled = stored.then(lambda tensor: tensor * 2)
    first = stored.then(lambda tensor: tensor[:1], (1,))
    assert not reads and doubled.shape == (2,) and first.shape == (1,)
    assert doubled.read().tolist() == [2, 2] and first.read().tolist() == [1]


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "holds a list; expected an object")])
def test_json_that_is_no_object(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json")


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x") as scratch:
        (scratch / "weights").write_text("half")
        raise RuntimeError
    assert not (tmp_path / "x").exists()
    with atomic_folder(tmp_path / "x") as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "file").write_text("whole")
    assert (tmp_path / "x" / "inner" / "file").read_text() == "whole"


def test_of_many_weights_that_do_not_fit_all_are_listed_or_the_first() -> None:
    expected = {"a": torch.ones(2), "b": torch.ones(2)}
    found = {"b": torch.ones(3), **{f"x{index}": torch.ones(1) for index in range(5)}}
    message = r"no fit. Missing: a; unexpected: x0, x1, x2, x3, x4; of another shape: b \(3,\), expected \(2,\). Go."
    with pytest.raises(ValueError, match=message):
        check_fit(expected, found, fault="no fit", advice="Go")
    with pytest.raises(ValueError, match=r"Missing: a; unexpected: x0, x1, … and 3 more; of another shape: b"):
        check_fit(expected, found, fault="no fit", advice="Go", most=2)
    check_fit(expected, {name: StoredTensor.of(tensor) for name, tensor in expected.items()}, fault="", advice="")
