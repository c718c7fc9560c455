"""The generation loop: which prompts share a batch, which process answers them, which were answered before.

Whatever answers many prompts comes here: `Predictor`, files of questions, evaluation, models of other kinds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from layerfuse.errors import InputError

__all__ = ["Ask", "Shard", "answer_all", "answer_batches", "find_shard", "form_batches"]

Ask = Callable[[Sequence[Sequence[int]]], Iterable[Sequence[str]]]
"""A model that is asked: batches of indices of prompts give, batch by batch, an answer to each."""


@dataclass(frozen=True)
class Shard:
    """One of several processes that share the prompts.

    Attributes:
        index: from 0.
        count: of processes.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a process that is none of them."""
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


def form_batches(lengths: Sequence[int], batch_size: int, shard: Shard | None = None) -> list[list[int]]:
    """Divide prompts into batches of like length, the longest first: they show at once whether memory suffices.

    Args:
        lengths: positions that each prompt takes up.
        batch_size: prompts at a time.
        shard: the process whose share is returned; None is the only one.

    Returns:
        Batches of indices, the same for the same arguments: a run that goes on forms those of before.

    Raises:
        ValueError: if the batch size is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is too small; answer at least 1 prompt at a time.")
    shard = shard or Shard()
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])[shard.index :: shard.count]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_batches(
    ask: Ask,
    batches: Sequence[Sequence[int]],
    write: Callable[[dict[int, str]], object],
    *,
    answered: Container[int] = (),
    show_bar: bool | None = None,
) -> int:
    """Answer batches one after the other, and hand each one's answers on as they come.

    Args:
        ask: the model; not called if no prompt waits.
        batches: indices of the prompts of this process.
        write: takes index -> answer of a batch; the next one begins when it returns.
        answered: prompts that were answered before, and are left out.
        show_bar: of progress; None shows it on a terminal.

    Returns:
        Number of prompts that were answered now.

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


def answer_all(ask: Ask, lengths: Sequence[int], batch_size: int, *, show_bar: bool | None = None) -> list[str]:
    """Answer all prompts, in their order; arguments and errors are those of `form_batches` and `answer_batches`."""
    answers: dict[int, str] = {}
    answer_batches(ask, form_batches(lengths, batch_size), answers.update, show_bar=show_bar)
    return [answers[index] for index in range(len(lengths))]
