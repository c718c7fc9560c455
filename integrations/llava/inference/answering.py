"""A file of questions, answered by a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from integrations.llava.modeling import Quantization
from layerfuse.errors import InputError

from .batching import Shard, answer_batches, form_batches
from .predictor import default_dtype, load_predictor, usable_device
from .prompt_builder import PreparedPrompts, load_preparer
from .requests import Request, prompt_lengths, question_fingerprints, refuse_broken_images
from .results import AnswerFile, answer_settings
from .sampling import SamplingParams

__all__ = ["answer_requests"]


def answer_requests(
    requests: Sequence[Request],
    model_folder: str | Path,
    path: str | Path,
    *,
    image_folder: str | Path,
    sampling: SamplingParams,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantization = "none",
    compile: bool = False,
    shard: Shard | None = None,
    overwrite: bool = False,
    num_workers: int | None = None,
    show_bar: bool | None = None,
    check: Callable[[Mapping[int | str, str]], None] | None = None,
) -> tuple[AnswerFile, int]:
    """Answer the questions that have no answer in a file yet, and write each batch as it comes.

    Whatever can be known before the model is loaded is checked before; it is not loaded if nothing waits.

    Args:
        requests: the questions.
        model_folder: of the model.
        path: of the file of answers.
        image_folder: what names of images are relative to.
        sampling: how answers are decoded.
        batch_size: questions at a time.
        device: see `usable_device`.
        dtype: to compute in; `default_dtype` if None.
        quantize: as for `load_predictor`.
        compile: as for `load_predictor`.
        shard: which process this is; None is the only one.
        overwrite: see `AnswerFile`.
        num_workers: see `Predictor.asker`.
        show_bar: of progress; None shows it on a terminal.
        check: is told the earlier answers, id -> text, and may refuse to go on.

    Returns:
        The file, to be merged, and the number of questions that were answered now.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if a prompt does not fit, an image cannot be read (all are listed), a number is too small, or as
            `AnswerFile` does.
        OSError: if answers cannot be written there.
    """
    device, shard = usable_device(device), shard or Shard()
    dtype = dtype or default_dtype(model_folder, device, quantize)
    preparer = load_preparer(model_folder)
    longest = sampling.max_new_tokens
    lengths = prompt_lengths(requests, preparer, image_folder=image_folder, max_new_tokens=longest)
    batches = form_batches(lengths, batch_size, shard)
    output = AnswerFile(
        path,
        requests,
        fingerprints=question_fingerprints(requests, image_folder),
        model_id=Path(model_folder).resolve().name,
        metadata=answer_settings(model_folder, preparer, dtype=dtype, quantize=quantize, sampling=sampling),
        shard=shard,
        overwrite=overwrite,
    )
    if check is not None:
        check(output.answers)
    if num_workers is not None and num_workers < 0:
        raise InputError(f"num_workers={num_workers} is negative; give 0 or more processes.")

    def ask(waiting: Sequence[Sequence[int]]) -> Iterator[Sequence[str]]:
        refuse_broken_images((requests[index] for batch in waiting for index in batch), image_folder)
        predictor = load_predictor(model_folder, device=device, dtype=dtype, quantize=quantize, compile=compile)
        images = [[Path(image_folder) / name for name in own.images] for own in requests]
        prompts = PreparedPrompts(predictor.prepare, [own.prompt for own in requests], images, max_new_tokens=longest)
        asker = predictor.asker(prompts, [str(own.id) for own in requests], sampling, num_workers=num_workers)
        yield from asker(waiting)

    answered = answer_batches(
        ask,
        batches,
        lambda answers: output.write({requests[index].id: text for index, text in answers.items()}),
        answered={index for index, own in enumerate(requests) if own.id in output},
        show_bar=show_bar,
    )
    return output, answered
