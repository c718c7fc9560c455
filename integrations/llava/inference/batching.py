"""The one generation loop: which prompts share a batch, which process answers them, which were answered before."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from layerfuse.errors import InputError

__all__ = ["Ask", "Shard", "answer_all", "answer_batches", "find_shard", "form_batches"]

Ask = Callable[[Sequence[Sequence[int]]], Iterable[Sequence[str]]]
"""A model that is asked: batches of indices of prompts give, batch by batch, an answer to each."""

# A prompt that is shorter than this share of the first of its group follows no more: padding would cost more than an
# image that is encoded again.
_ALIKE = 0.9


@dataclass(frozen=True)
class Shard:
    """One of several (`count`) processes that share the prompts; `index` is from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index}/{self.count} does not exist; the first of 4 is 0/4, the last 3/4.")


def find_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """Make a shard of a text ("0/4" is the first of four processes); None takes torchrun's RANK and WORLD_SIZE.

    Raises:
        ValueError: if the text is of another form, or there is no such process.
    """
    if text is None:
        return Shard(int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)))
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise InputError(f"shard {text!r} is not of the form INDEX/COUNT; the first of 4 is 0/4, the last 3/4.")
    return Shard(int(index), int(count))


def form_batches(
    lengths: Sequence[int], batch_size: int, shard: Shard | None = None, *, groups: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Divide prompts, given the positions they take up, into batches of like length; return those of one process.

    The longest come first: they show at once whether memory suffices. Prompts of one group, such as an image, follow
    each other as far as their lengths are alike; those of an empty group belong together with none. The same arguments
    give the same batches of indices, so that a run which goes on forms those of before.

    Raises:
        ValueError: if the batch size is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is too small; answer at least 1 prompt at a time.")
    shard = shard or Shard()
    runs: list[list[int]] = []
    latest: dict[Hashable, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        group = groups[index] if groups is not None else None
        run = latest.get(group) if group else None
        if run is None or len(run) == batch_size or lengths[index] < _ALIKE * lengths[run[0]]:
            runs.append(run := [])
            latest[group] = run
        run.append(index)
    order = [index for run in runs[shard.index :: shard.count] for index in run]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_batches(
    ask: Ask,
    batches: Sequence[Sequence[int]],
    write: Callable[[dict[int, str]], object],
    *,
    answered: Container[int] = (),
    show_bar: bool | None = None,
) -> int:
    """Answer batches of indices of prompts one after the other; return how many prompts were answered.

    The model is not called if no prompt waits, and the next batch begins when `write`, which takes index -> answer of a
    batch, returns. `answered` prompts are left out; `show_bar`, if None, shows progress on a terminal.

    Raises:
        ValueError: if the model gives another number of answers than it was asked prompts.
    """
    waiting = [rest for batch in batches if (rest := [index for index in batch if index not in answered])]
    total, count = sum(map(len, batches)), sum(map(len, waiting))
    if not count:
        return 0
    results = zip(waiting, ask(waiting), strict=True)
    disable = None if show_bar is None else not show_bar
    with tqdm(total=total, initial=total - count, desc="answers", unit="question", disable=disable) as bar:
        for batch, answers in results:
            if len(answers) != len(batch):
                raise InputError(f"the model gave {len(answers)} answers to {len(batch)} questions; expected one each.")
            write(dict(zip(batch, answers, strict=True)))
            bar.update(len(batch))
    return count


def answer_all(
    ask: Ask,
    lengths: Sequence[int],
    batch_size: int,
    *,
    groups: Sequence[Hashable] | None = None,
    show_bar: bool | None = None,
) -> list[str]:
    """Answer all prompts, in their order; arguments and errors are those of `form_batches` and `answer_batches`."""
    answers: dict[int, str] = {}
    answer_batches(ask, form_batches(lengths, batch_size, groups=groups), answers.update, show_bar=show_bar)
    return [answers[index] for index in range(len(lengths))]
