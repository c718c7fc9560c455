"""Files of weights: read one tensor at a time, written in shards.

Reads safetensors, and `.bin` files as `torch.save` writes them, through `weights_only=True`: a file that wants to build
anything but tensors is refused before it does.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.modeling_utils import str_to_torch_dtype

from integrations.llava._text import listed
from layerfuse.errors import InputError, MissingFileError

__all__ = [
    "CONFIG_FILE",
    "StoredTensor",
    "check_fit",
    "holds_model",
    "read_json",
    "stored_model",
    "stored_tensors",
    "weight_files",
    "write_json",
    "write_sharded",
]

CONFIG_FILE = "config.json"
_SHARD_BYTES = 2 * 2**30
# The first that a folder has counts; a connector (`mm_projector.bin`) may lie beside.
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
# As safetensors names them.
_DTYPES: Mapping[str, torch.dtype] = {**str_to_torch_dtype, "C64": torch.complex64}

# What torch.load raises, by the byte that is wrong.
_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, struct.error, pickle.UnpicklingError),
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file, from which `read` takes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> StoredTensor:
        """A tensor in memory, as if it were in a file."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def then(
        self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None
    ) -> StoredTensor:
        """The tensor as `change` returns it, of the same dtype, once it is read; `shape` is given if it differs."""
        return StoredTensor(self.shape if shape is None else shape, self.dtype, lambda: change(self.read()))


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model's weights, in one file or in shards."""
    return any((folder / f"{name}{index}").is_file() for name in _MODEL_FILES for index in ("", ".index.json"))


def weight_files(folder: Path) -> list[Path]:
    """Files of a model's weights in a folder, adapters included, by name; those of a connector alone are none."""
    patterns = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "non_lora_trainables.bin")
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def stored_model(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of the model in a folder, in the order of its files: one, or shards with an index.

    Raises:
        FileNotFoundError: if it holds no weights, or a shard is missing.
        ValueError: if a file is damaged, holds code, or does not hold what the index says.
    """
    for name in _MODEL_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _stored_shards(index)
        if (folder / name).is_file():
            return stored_tensors(folder / name)
    raise MissingFileError(
        f"{folder} holds no weights; expected {' or '.join(_MODEL_FILES)}, or an index of shards (*.index.json)."
    )


def _stored_shards(index: Path) -> dict[str, StoredTensor]:
    places: dict[str, str] = read_json(index).get("weight_map") or {}
    shards = sorted({*places.values()})
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside or not shards:
        raise InputError(
            f"{index} names {', '.join(outside) or 'no shards'}; shards are files beside it. Take the index that "
            "belongs to the shards."
        )
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise MissingFileError(f"{index.parent} lacks the shards {', '.join(missing)}; download them again.")
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        found |= {
            name: tensor
            for name, tensor in stored_tensors(index.parent / shard).items()
            if places.get(name, shard) == shard
        }
    absent = sorted(set(places) - set(found))
    if absent:
        raise InputError(f"the shards of {index.parent} lack what {index.name} says they hold: {', '.join(absent)}.")
    return found


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a `.safetensors` file, or of one that `torch.save` wrote, which is mapped into memory.

    Raises:
        ValueError: if it is damaged, holds code, or something that is no tensor.
    """
    if path.suffix != ".safetensors":
        return _pickled(path)
    try:
        # Closed when the last of its tensors is forgotten.
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); download or write it anew.") from error
    found = {}
    for name in file.keys():  # noqa: SIM118  (this is no dictionary)
        entry = file.get_slice(name)
        kind = entry.get_dtype()
        if kind not in _DTYPES:
            raise InputError(f"{path}: {name} is of type {kind}; known are {', '.join(_DTYPES)}.")
        found[name] = StoredTensor(tuple(entry.get_shape()), _DTYPES[kind], partial(file.get_tensor, name))
    return found


def _pickled(path: Path) -> dict[str, StoredTensor]:
    try:
        # Files of PyTorch before 1.6, which are no zip files, cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except _DAMAGE as error:
        # torch writes "Unsupported global", and "unsupported GLOBAL" of modules that it blocks.
        if "unsupported global" in str(error).lower():
            raise InputError(
                f"{path} holds more than tensors: Python objects, which run code when they are read. It was refused "
                "and nothing was run. Get the weights as safetensors from somebody you trust."
            ) from error
        # torch advises to read it as code.
        reason = "it holds no pickle of tensors, or is damaged" if "weights_only" in str(error) else error
        raise InputError(f"{path} is not a whole file of weights ({reason}); download or write it anew.") from error
    strange = (
        sorted(str(name) for name, value in content.items() if not isinstance(value, torch.Tensor))
        if isinstance(content, Mapping)
        else [type(content).__name__]
    )
    if strange:
        raise InputError(f"{path} holds more than named tensors: {', '.join(strange)}. Save the state dict alone.")
    # Copied, since tensors of one file may share memory, which safetensors does not store.
    return {str(name): StoredTensor(tuple(value.shape), value.dtype, value.clone) for name, value in content.items()}


def check_fit(
    expected: Mapping[str, torch.Tensor | StoredTensor],
    found: Mapping[str, torch.Tensor | StoredTensor],
    *,
    fault: str,
    advice: str,
    most: int | None = None,
) -> None:
    """Compare the names and shapes of weights.

    Args:
        expected: the model's.
        found: those that are to be loaded.
        fault: a sentence that says what does not fit; names and shapes follow.
        advice: a sentence that says what to do.
        most: names of each kind that the message lists; None lists all.

    Raises:
        ValueError: listing every missing, unexpected and misshapen weight.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if missing or unexpected or misshapen:
        raise InputError(
            f"{fault}. Missing: {listed(missing, most=most)}; unexpected: {listed(unexpected, most=most)}; of another "
            f"shape: {listed(misshapen, most=most)}. {advice}."
        )


def write_sharded(
    tensors: Mapping[str, StoredTensor],
    folder: Path,
    *,
    shard_bytes: int = _SHARD_BYTES,
    num_shards: int | None = None,
) -> None:
    """Write a model's weights as safetensors, in their order; no more than one shard is in memory at a time.

    Args:
        tensors: all of them.
        folder: where `model.safetensors`, or shards and their index, go.
        shard_bytes: a shard's size; the tensor that reaches it still goes in.
        num_shards: write so many, of like sizes, whatever that is.
    """
    total = sum(tensor.num_bytes for tensor in tensors.values())
    size = shard_bytes if num_shards is None else total / num_shards
    shards: dict[int, list[str]] = {}
    before = 0
    for name, tensor in tensors.items():
        # A shard holds what begins within its share.
        shards.setdefault(int(before / size), []).append(name)
        before += tensor.num_bytes
    places: dict[str, str] = {}
    for number, names in enumerate(tqdm(shards.values(), desc="writing shards", disable=None, leave=False), start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(names, file)
        save_file({name: tensors[name].read().contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON in UTF-8: {error}. Download or write it anew.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected an object with keys.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, keys in order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
