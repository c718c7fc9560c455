"""The precision and the device that a user asks for, in whichever words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from layerfuse.errors import InputError

__all__ = ["as_device", "as_dtype"]


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the floating dtype that a user means; None for None and "auto", which leave weights as they are."""
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found is None or found == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {dtype!r} is no floating dtype of torch; give torch.bfloat16, 'float16', … or None.")
    return found


def as_device(
    device: torch.device | str | None, device_map: Mapping[str, Any] | torch.device | str | None = None
) -> torch.device | None:
    """Return the one device that all weights go to; None leaves them where they are.

    Args:
        device: a device of torch or its name, or None.
        device_map: the same in transformers' words, also as ``{"": device}``.

    Raises:
        ValueError: if both are given, it is no device, or a map names several.
    """
    if device is not None and device_map is not None:
        raise InputError("device and device_map say the same; give one of them.")
    place = device if device is not None else device_map
    if isinstance(place, Mapping):
        if set(place) != {""}:
            raise InputError(f"device_map {dict(place)} splits the encoder, which lies on one device; give device=….")
        place = place[""]
    if place is None:
        return None
    try:
        return torch.device(place)
    except RuntimeError as error:
        raise InputError(
            f"{place!r} is no device of torch; an encoder lies on one: give 'cpu', 'cuda', 'cuda:1', 'mps', …"
        ) from error
