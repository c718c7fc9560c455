"""Files of questions and their answers: opened, then asked in batches whose images other processes prepare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from integrations.llava.data import read_image
from layerfuse.errors import InputError

from .batching import Shard, answer_batches, form_batches
from .predictor import Predictor
from .prompt_builder import Preparer, load_preparer
from .requests import Request, prompt_lengths, question_fingerprints, refuse_broken_images
from .results import AnswerFile, answer_settings
from .sampling import SamplingParams

__all__ = ["answer_into", "answer_requests", "open_answers"]


def open_answers(
    path: str | Path,
    requests: Sequence[Request],
    model_folder: str | Path,
    *,
    image_folder: str | Path,
    sampling: SamplingParams,
    dtype: torch.dtype,
    quantize: str = "none",
    batch_size: int = 8,
    shard: Shard | None = None,
    overwrite: bool = False,
) -> tuple[AnswerFile, list[list[int]]]:
    """Open the answers that a model gives to questions, after checking all that can be known before it is loaded.

    Args:
        path: of the answers.
        requests: the questions.
        model_folder: of the model.
        image_folder: what names of images are relative to.
        sampling: how answers are decoded.
        dtype: that is computed in.
        quantize: how the language model is stored.
        batch_size: questions at a time.
        shard: which process this is; None is the only one.
        overwrite: see `AnswerFile`.

    Returns:
        The answers, and the batches of this process as indices of the questions.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if a prompt does not fit, the batch size is below 1, or as `AnswerFile` does.
        OSError: if the answers cannot be written there.
    """
    shard = shard or Shard()
    preparer = load_preparer(model_folder)
    lengths = prompt_lengths(requests, preparer, image_folder=image_folder, max_new_tokens=sampling.max_new_tokens)
    batches = form_batches(lengths, batch_size, shard)
    answers = AnswerFile(
        path,
        requests,
        fingerprints=question_fingerprints(requests, image_folder),
        model_id=Path(model_folder).resolve().name,
        metadata=answer_settings(model_folder, preparer, dtype=dtype, quantize=quantize, sampling=sampling),
        shard=shard,
        overwrite=overwrite,
    )
    return answers, batches


def answer_into(
    output: AnswerFile,
    load: Callable[[], Predictor],
    batches: Sequence[Sequence[int]],
    *,
    image_folder: str | Path,
    sampling: SamplingParams,
    num_workers: int | None = None,
    show_bar: bool | None = None,
) -> int:
    """Answer the questions that wait, and write each batch as it comes.

    Args:
        output: of these questions; those that it knows answers of are left out.
        load: loads the model; called when all images are known to be whole, and not at all if nothing waits.
        batches: indices of the questions of this process.
        image_folder: what names of images are relative to.
        sampling: how.
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
    waiting = [own for full in batches if (own := [index for index in full if requests[index].id not in output])]
    count = sum(map(len, waiting))
    refuse_broken_images((requests[index] for batch in waiting for index in batch), image_folder)
    if count:
        ask = partial(
            answer_requests,
            load(),
            requests,
            image_folder=image_folder,
            sampling=sampling,
            num_workers=num_workers,
        )
        answer_batches(
            ask,
            waiting,
            lambda answers: output.write({requests[index].id: text for index, text in answers.items()}),
            answered=sum(map(len, batches)) - count,
            show_bar=show_bar,
        )
    return count


def answer_requests(
    predictor: Predictor,
    requests: Sequence[Request],
    batches: Sequence[Sequence[int]],
    *,
    image_folder: str | Path,
    sampling: SamplingParams,
    num_workers: int | None = None,
) -> Iterator[list[str]]:
    """Answer questions batch by batch.

    Args:
        predictor: the model.
        requests: all questions.
        batches: indices of those to be answered.
        image_folder: what names of images are relative to.
        sampling: how.
        num_workers: processes that prepare prompts and images; 0 prepares them in this one, and None starts 4 where a
            GPU computes.

    Yields:
        The answers of a batch, in its order.

    Raises:
        ValueError: if an image cannot be read.
        FileNotFoundError: if an image is missing.
    """
    on_gpu = predictor.model.device.type == "cuda"
    if num_workers is None:
        num_workers = 4 if on_gpu else 0
    size = max(map(len, batches), default=0)
    # Compiled code is for one batch size: a smaller batch is filled up with copies, whose answers are dropped.
    filled = [[*batch, *[batch[-1]] * (size - len(batch))] if predictor.compile else [*batch] for batch in batches]
    loader = DataLoader(
        _Requests(requests, predictor.prepare, Path(image_folder)),
        batch_sampler=filled,
        collate_fn=predictor.collate,
        num_workers=num_workers,
        pin_memory=on_gpu,
        generator=torch.Generator(),
    )
    for batch, full, tensors in zip(batches, filled, loader, strict=True):
        keys = [str(requests[index].id) for index in full]
        yield predictor.answer_batch(tensors, keys, sampling)[: len(batch)]


class _Requests(Dataset[dict[str, torch.Tensor]]):
    """Questions, prepared when they are asked for."""

    def __init__(self, requests: Sequence[Request], prepare: Preparer, image_folder: Path) -> None:
        self.requests, self.prepare, self.image_folder = requests, prepare, image_folder

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        request = self.requests[index]
        return self.prepare([read_image(self.image_folder / name) for name in request.images], request.prompt)
