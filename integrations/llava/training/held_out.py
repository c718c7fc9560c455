"""Held-out samples: opened and checked before training, and the loss on them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from integrations.llava.config import StageConfig
from integrations.llava.data import ConversationDataset, Sample, read_samples, select_samples, source_of, usable_indices
from integrations.llava.prompts import Template
from layerfuse.errors import InputError

from .signals import start_deaf
from .trainer import LlavaTrainer, num_supervised

__all__ = ["LOSS", "find_held_out", "held_out_losses", "open_held_out"]

LOSS = "loss"
"""Name of the loss on all held-out samples; on those of one source it is followed by a slash and the source."""

_log = logging.getLogger(__name__)

# Samples of no source that has a name.
_OTHER = "other"


def find_held_out(config: StageConfig, template: Template) -> np.ndarray | None:
    """Indices of a stage's held-out samples in their file, which one process checks for all; None if it has none.

    Raises:
        ValueError: if they are at fault, and shall not be left out.
    """
    validation, data = config.validation, config.data
    if not validation.path:
        return None

    try:
        usable, _ = usable_indices(
            read_samples(validation.path, seed=config.seed),
            image_folder=validation.image_folder or data.image_folder,
            template=template,
            check_images=data.check_images,
            bad_samples=data.bad_samples,
        )
    except InputError as error:
        raise InputError(f"held-out samples (validation.path): {error}") from error
    return usable


def open_held_out(config: StageConfig, indices: np.ndarray | None) -> Sequence[Sample] | None:
    """Open the held-out samples that the main process has found; None if there are none."""
    if indices is None:
        return None
    return select_samples(read_samples(config.validation.path, seed=config.seed), indices)


@torch.no_grad()
def held_out_losses(trainer: LlavaTrainer, *, in_step: bool = False) -> dict[str, float]:
    """Compute the mean loss of supervised tokens, as training computes it, without dropout; all processes call this.

    Every token weighs alike, whatever batch or process it falls to. Samples come in the order of their file, those of
    one source (their key `source`, or the file that they are from) together.

    Args:
        trainer: in training; `eval_dataset` are the samples. Its model is left in evaluation mode.
        in_step: let every process take all samples, for an engine whose processes have to call the same modules.

    Returns:
        `LOSS`, and where there are several sources, the loss of each.

    Raises:
        ValueError: if nothing in the samples is supervised.
    """
    dataset: Any = trainer.eval_dataset
    names, batches = _batches(dataset.samples, trainer.args.train_batch_size)
    rank, size = (0, 1) if in_step else (trainer.args.process_index, trainer.args.world_size)
    share = batches[rank::size]
    # Engines wait for one another in every batch, so that all processes need the same number.
    filled = [*share, *islice(repeat(batches[0]), -(-len(batches) // size) - len(share))]
    model = trainer.model_wrapped.eval()
    found = []
    shown = trainer.is_world_process_zero()
    bar = tqdm(total=len(filled), desc="evaluation", leave=False, disable=None if shown else True)
    for batch in _loaded(trainer, dataset, [indices for _, indices in filled]):
        batch.pop("sample_ids", None)
        for why in batch.pop("skipped", ()):
            _log.warning("evaluation: skipped %s", why)
        inputs = trainer._prepare_inputs(batch)
        loss = model(**inputs, **trainer.options, num_items_in_batch=1)["loss"]
        found.append(torch.stack([loss.float(), num_supervised(inputs["labels"]).to(loss.device)]))
        bar.update()
    bar.close()
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    sources = torch.tensor([source for source, _ in share], dtype=torch.int64)
    sums.index_add_(0, sources, torch.stack(found)[: len(share)].cpu().double())
    # Processes have to decide alike by these numbers, also those of an engine in step, which all have the same ones but
    # for rounding.
    if trainer.args.world_size > 1:
        sums = trainer.accelerator.reduce(sums.to(trainer.args.device), reduction="sum").cpu()
    total, count = sums.sum(dim=0).tolist()
    if not count:
        raise InputError(
            "no token of the held-out samples (validation.path) has a label: all answers are empty, or cut off at "
            "data.max_length; look at them with `python -m integrations.llava data check`."
        )
    losses = {LOSS: total / count}
    if len(names) > 1:
        losses |= {f"{LOSS}/{name}": own / n for name, (own, n) in zip(names, sums.tolist(), strict=True) if n}
    return losses


def _batches(samples: Sequence[Sample], size: int) -> tuple[list[str], list[tuple[int, list[int]]]]:
    """Names of sources; and batches, each of one source: its place among the names, and indices."""
    by_source: dict[str, list[int]] = {}
    for index in range(len(samples)):
        by_source.setdefault(_source(samples, index), []).append(index)
    names = sorted(by_source)
    batches = [
        (place, own[start : start + size])
        for place, own in enumerate(by_source[name] for name in names)
        for start in range(0, len(own), size)
    ]
    return names, batches


def _source(samples: Sequence[Sample], index: int) -> str:
    own = samples[index].get("source")
    return own if isinstance(own, str) and own else source_of(samples, index) or _OTHER


def _loaded(trainer: LlavaTrainer, dataset: ConversationDataset, batches: Sequence[list[int]]) -> DataLoader[Any]:
    args = trainer.args
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        worker_init_fn=functools.partial(start_deaf, None),
        # Else the seed of its workers would be drawn from what training draws from.
        generator=torch.Generator().manual_seed(0),
    )
