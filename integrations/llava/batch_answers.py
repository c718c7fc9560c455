"""Many questions: batches of like length, images prepared by other processes while the model computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from .answer_files import Shard
from .decoding import Decoding
from .generate import Answerer
from .images import read_image
from .preparing import Preparer
from .request_files import Request

__all__ = ["answer_requests", "form_batches"]


def form_batches(lengths: Sequence[int], batch_size: int, shard: Shard) -> list[list[int]]:
    """Divide questions into batches of like length, the longest first: they show at once whether memory suffices.

    Args:
        lengths: positions that each prompt takes up.
        batch_size: questions at a time.
        shard: the process whose share is wanted.

    Returns:
        Batches of indices. They depend on nothing but the arguments, so that a run that is continued forms the same.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])[shard.index :: shard.count]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_requests(
    answerer: Answerer,
    requests: Sequence[Request],
    batches: Sequence[Sequence[int]],
    *,
    image_folder: str | Path,
    decoding: Decoding,
    num_workers: int = 0,
) -> Iterator[dict[int | str, str]]:
    """Answer questions batch by batch.

    Args:
        answerer: the model.
        requests: all questions.
        batches: indices of those to be answered.
        image_folder: what names of images are relative to.
        decoding: how.
        num_workers: processes that prepare prompts and images; 0 prepares them in this one.

    Yields:
        Per batch, id -> answer.

    Raises:
        ValueError: if an image cannot be read.
        FileNotFoundError: if an image is missing.
    """
    size = max(map(len, batches), default=0)
    # Compiled code is for one batch size: a smaller batch is filled up with copies, whose answers are dropped.
    filled = [[*batch, *[batch[-1]] * (size - len(batch))] if answerer.compile else [*batch] for batch in batches]
    loader = DataLoader(
        _Requests(requests, answerer.prepare, Path(image_folder)),
        batch_sampler=filled,
        collate_fn=answerer.collate,
        num_workers=num_workers,
        pin_memory=answerer.model.device.type == "cuda",
        generator=torch.Generator(),
    )
    for batch, tensors in zip(filled, loader, strict=True):
        ids = [requests[index].id for index in batch]
        answers = answerer.answer_batch(tensors, [str(own_id) for own_id in ids], decoding)
        yield dict(zip(ids, answers, strict=True))


class _Requests(Dataset[dict[str, torch.Tensor]]):
    """Questions, prepared when they are asked for."""

    def __init__(self, requests: Sequence[Request], prepare: Preparer, image_folder: Path) -> None:
        self.requests, self.prepare, self.image_folder = requests, prepare, image_folder

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        request = self.requests[index]
        return self.prepare([read_image(self.image_folder / name) for name in request.images], request.prompt)
