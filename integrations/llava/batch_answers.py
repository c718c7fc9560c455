"""Many questions: batches of like length, images prepared by other processes while the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from layerfuse.errors import InputError

from .answer_files import AnswerFile, Shard
from .decoding import Decoding
from .generate import Answerer
from .images import read_image
from .preparing import Preparer
from .request_files import Request, refuse_broken_images

__all__ = ["answer_into", "answer_requests", "form_batches"]


def form_batches(lengths: Sequence[int], batch_size: int, shard: Shard) -> list[list[int]]:
    """Divide questions into batches of like length, the longest first: they show at once whether memory suffices.

    Args:
        lengths: positions that each prompt takes up.
        batch_size: questions at a time.
        shard: the process whose share is wanted.

    Returns:
        Batches of indices. They depend on nothing but the arguments, so that a run that is continued forms the same.

    Raises:
        ValueError: if the batch size is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is too small; ask at least 1 question at a time.")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])[shard.index :: shard.count]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_into(
    output: AnswerFile,
    load: Callable[[], Answerer],
    batches: Sequence[Sequence[int]],
    *,
    image_folder: str | Path,
    decoding: Decoding,
    num_workers: int | None = None,
    show_bar: bool | None = None,
) -> int:
    """Answer the questions that wait, and write each batch as it comes.

    Args:
        output: of these questions; those that it knows answers of are left out.
        load: loads the model; called when all images are known to be whole, and not at all if nothing waits.
        batches: indices of the questions of this process.
        image_folder: what names of images are relative to.
        decoding: how.
        num_workers: as for `answer_requests`.
        show_bar: of progress; None shows it on a terminal.

    Returns:
        How many questions were answered now.

    Raises:
        ValueError: if an image cannot be read (all are listed at the start), or the number of workers is negative.
        OSError: if answers cannot be written any more.
    """
    if num_workers is not None and num_workers < 0:
        raise InputError(f"num_workers={num_workers} is negative; give 0 or more processes.")
    requests = output.requests
    share = sum(map(len, batches))
    batches = [own for full in batches if (own := [index for index in full if requests[index].id not in output])]
    waiting = sum(map(len, batches))
    refuse_broken_images((requests[index] for batch in batches for index in batch), image_folder)
    if not waiting:
        return 0
    disable = None if show_bar is None else not show_bar
    with tqdm(total=share, initial=share - waiting, desc="answers", unit="question", disable=disable) as bar:
        answered = answer_requests(
            load(), requests, batches, image_folder=image_folder, decoding=decoding, num_workers=num_workers
        )
        for answers in answered:
            output.write(answers)
            bar.update(len(answers))
    return waiting


def answer_requests(
    answerer: Answerer,
    requests: Sequence[Request],
    batches: Sequence[Sequence[int]],
    *,
    image_folder: str | Path,
    decoding: Decoding,
    num_workers: int | None = None,
) -> Iterator[dict[int | str, str]]:
    """Answer questions batch by batch.

    Args:
        answerer: the model.
        requests: all questions.
        batches: indices of those to be answered.
        image_folder: what names of images are relative to.
        decoding: how.
        num_workers: processes that prepare prompts and images; 0 prepares them in this one, and None starts 4 where a
            GPU computes.

    Yields:
        Per batch, id -> answer.

    Raises:
        ValueError: if an image cannot be read.
        FileNotFoundError: if an image is missing.
    """
    on_gpu = answerer.model.device.type == "cuda"
    if num_workers is None:
        num_workers = 4 if on_gpu else 0
    size = max(map(len, batches), default=0)
    # Compiled code is for one batch size: a smaller batch is filled up with copies, whose answers are dropped.
    filled = [[*batch, *[batch[-1]] * (size - len(batch))] if answerer.compile else [*batch] for batch in batches]
    loader = DataLoader(
        _Requests(requests, answerer.prepare, Path(image_folder)),
        batch_sampler=filled,
        collate_fn=answerer.collate,
        num_workers=num_workers,
        pin_memory=on_gpu,
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
