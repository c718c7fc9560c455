"""A memory that holds so many positions and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from integrations.llava.modeling import FusedLlavaForConditionalGeneration

__all__ = ["limited"]


@contextmanager
def limited(most: int, *, calls: int = 0) -> Iterator[list[tuple[int, ...]]]:
    """Let a model's forward pass raise torch.OutOfMemoryError for larger batches, after some calls.

    Yields:
        The shapes of the batches so far.
    """
    seen: list[tuple[int, ...]] = []
    plain = FusedLlavaForConditionalGeneration.forward

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        if len(seen) > calls and kwargs["input_ids"].numel() > most:
            raise torch.OutOfMemoryError(f"tried to allocate room for {most + 1} positions.\nThe rest is long.")
        return plain(model, *args, **kwargs)

    with mock.patch.object(FusedLlavaForConditionalGeneration, "forward", forward):
        yield seen
