"""Finds where our code would make the host wait for a GPU: where a number of a tensor, or a shape, is read from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).parents[3]
_OURS = tuple(str(_ROOT / package) for package in ("integrations", "layerfuse"))
_TORCH = str(Path(torch.__file__).parent)
_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense,
    _aten.is_nonzero,
    _aten.equal,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
}
_INDEXES = {_aten.index, _aten.index_put, _aten.index_put_}


class HostWaits(TorchDispatchMode):
    """Notes the functions of ours that read from a tensor while it is entered, in `found`; others' are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        if (
            packet in _READS
            or (packet in _INDEXES and any(_is_mask(index) for index in args[1]))
            or (packet is _aten.repeat_interleave and (kwargs or {}).get("output_size") is None)
        ):
            self._note()
        return func(*args, **(kwargs or {}))

    def _note(self) -> None:
        frame = sys._getframe(2)
        # torch is how everyone reads: it answers for nobody.
        while frame.f_code.co_filename.startswith(_TORCH) and frame.f_back is not None:
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(_OURS):
            self.found.append(frame.f_code.co_name)


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype == torch.bool
