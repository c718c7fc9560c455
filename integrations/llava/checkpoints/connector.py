"""Files of a connector, which is fuser and projector: the first stage writes one and the second starts from it.

The file is called `adapter.safetensors`, as version 0.1 called it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from integrations.llava.modeling import part_of
from layerfuse.errors import MissingFileError
from layerfuse.files import atomic_folder

from .key_maps import our_connector
from .tensors import check_fit, stored_tensors

__all__ = ["load_connector", "save_connector"]


def save_connector(model: nn.Module, parts: Sequence[str], path: str | Path) -> Path:
    """Write the parameters of some parts of a model (names from `PARTS`) to a `.safetensors` file; return its path."""
    path = Path(path)
    with atomic_folder(path.parent) as scratch:
        save_file(_state_of(model, parts), scratch / path.name, metadata={"format": "pt", "parts": ",".join(parts)})
    return path


def load_connector(model: nn.Module, parts: Sequence[str], path: str | Path) -> None:
    """Load fuser and projector into a model, which is changed in place.

    Args:
        model: the whole model.
        parts: those that the file has to cover.
        path: a file of `save_connector`, or `mm_projector.bin` of the published stage 1, read without running code.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds code, a published fuser lost its scales, or its keys are not those of the
            parts; all are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"connector {path} does not exist; run the stage that writes it first.")
    stored = stored_tensors(path)
    if any("mm_projector." in name for name in stored):
        stored = our_connector(stored)
    check_fit(
        _state_of(model, parts),
        stored,
        fault=f"connector {path} does not fit the {', '.join(parts)} of this model",
        advice="Use the recipe's own model settings",
    )
    model.load_state_dict({name: tensor.read() for name, tensor in stored.items()}, strict=False)


def _state_of(model: nn.Module, parts: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if part_of(name) in parts}
