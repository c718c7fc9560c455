"""A trial before the first step: the batch that takes most goes forward and backward, and leaves no trace.

So what does not fit into memory is said in the first minute, with the micro batch that does fit, and not at the step
that happens to have the longest samples. Weights, buffers, random numbers and the order of the data stay as they were:
the losses are those of a run without trial, bit for bit.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from integrations.llava.config import StageConfig
from integrations.llava.data import ConversationDataset, image_names
from layerfuse.errors import InputError

from .distributed import any_process, on_main
from .engines import shards
from .optimizer import state_bytes_each
from .trainer import LlavaTrainer

__all__ = ["try_longest"]

_log = logging.getLogger(__name__)

# UTF-8 bytes of a token: four letters of English, a character of Chinese. Only for which batches are looked at.
_BYTES_PER_TOKEN = 3.5
# Batches that promise to be the longest, of which the one that is goes through the model.
_LOOKED_AT = 3

_Prepared = list[dict[str, Any]]


def try_longest(trainer: LlavaTrainer, config: StageConfig, stage: str, *, resumed: bool = False) -> None:
    """Let the batches with most positions and most images go through the model; every process has to call this.

    Args:
        trainer: as training begins: model wrapped, optimizer made.
        config: of the stage.
        stage: its name.
        resumed: whether the stage goes on from a checkpoint, so that its micro batches are what they are.

    Raises:
        ValueError: if one does not fit; the micro batch that does is named.
    """
    if trainer.is_deepspeed_enabled:
        _log.info("stage %s: no trial of the longest batch: DeepSpeed makes a step with every backward pass", stage)
        return
    dataset: Any = trainer.train_dataset
    chosen = on_main(lambda: _heaviest(trainer, dataset, padding_free=config.padding_free))
    batches = [[dataset[index] for index in indices] for indices in chosen]
    largest = max(batches, key=_positions(trainer))
    tried = [largest, *(batch for batch in batches[-1:] if batch is not largest and _tiles(batch) > _tiles(largest))]
    with _traceless(trainer, config):
        for batch in tried:
            if not _fits(trainer, config, batch):
                raise InputError(f"stage {stage} {_way_out(trainer, config, stage, batch, resumed=resumed)}")
    shape = tuple(trainer.data_collator(largest)["input_ids"].shape)
    _log.info("stage %s: its longest micro batch, %d x %d positions, fits", stage, *shape)


def _heaviest(trainer: LlavaTrainer, dataset: ConversationDataset, *, padding_free: bool) -> list[list[int]]:
    """Indices of the micro batches that promise most positions, then of the one with most images."""
    image = dataset.layout.num_tokens(dataset.layout.largest_size)
    rows = []
    for index in range(len(dataset)):
        sample = dataset.samples[index]
        images = len(image_names(sample))
        text = sum(len(turn["value"].encode("utf-8", "replace")) for turn in sample["conversations"])
        rows.append((min(text / _BYTES_PER_TOKEN + images * image, dataset.max_length), images))
    positions, images = np.array(rows, dtype=float).T
    sampler: Any = trainer._get_train_sampler()
    sampler.set_epoch(int(trainer.state.epoch or 0))
    order, size = list(sampler), trainer.args.per_device_train_batch_size
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    chunks = chunks[: trainer.state.max_steps * trainer.args.gradient_accumulation_steps * trainer.args.world_size]

    def taken(chunk: list[int]) -> float:
        return float(positions[chunk].sum() if padding_free else len(chunk) * positions[chunk].max())

    long = sorted(chunks, key=taken, reverse=True)[:_LOOKED_AT]
    return [*long, max(chunks, key=lambda chunk: images[chunk].sum())]


def _positions(trainer: LlavaTrainer) -> Any:
    return lambda batch: trainer.data_collator(batch)["input_ids"].numel()


def _tiles(batch: _Prepared) -> int:
    return sum(len(sample["pixel_values"]) + len(sample.get("feature_maps", ())) for sample in batch)


def _fits(trainer: LlavaTrainer, config: StageConfig, batch: _Prepared) -> bool:
    """Whether a micro batch goes through the model in every process, with gradients and optimizer states beside it."""
    fits = True
    try:
        _pass(trainer, config, batch)
    except torch.OutOfMemoryError:
        # Others would wait in a collective for a process that is out of memory, and none may try again alone.
        if shards(config.engine, num_processes=trainer.args.world_size):
            raise InputError(_sharded(trainer, batch)) from None
        fits = False
    # What the failed pass held is free once its error is gone.
    trainer.model.zero_grad()  # type: ignore[union-attr]
    gc.collect()
    torch.cuda.empty_cache()
    return not any_process(not fits)


def _pass(trainer: LlavaTrainer, config: StageConfig, batch: _Prepared) -> None:
    # Without DDP around it: its gradients are not to be summed over processes.
    model: Any = trainer.model
    states = [torch.empty(number, dtype=torch.uint8, device=where) for number, where in _states(trainer, config)]
    model.train()
    # Where micro batches are summed up, the second meets the gradients of the first.
    for _ in range(min(trainer.args.gradient_accumulation_steps, 2)):
        inputs = {k: v for k, v in trainer.data_collator(batch).items() if k not in ("sample_ids", "skipped")}
        inputs = trainer._prepare_inputs(inputs)
        model(**inputs, **trainer.options, num_items_in_batch=inputs["input_ids"].numel())["loss"].backward()
    del states


def _states(trainer: LlavaTrainer, config: StageConfig) -> Iterator[tuple[int, torch.device]]:
    """Bytes that the optimizer will keep of each trained parameter, where it keeps none yet."""
    assert isinstance(trainer.model, nn.Module)
    each = state_bytes_each(config, trainer.args, trainer.args.device)
    kept = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state  # type: ignore[union-attr]
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and not kept.get(parameter):
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            yield int(own.numel() * each), own.device


@contextmanager
def _traceless(trainer: LlavaTrainer, config: StageConfig) -> Iterator[None]:
    """Leave random numbers and buffers as they were, and code uncompiled, which is compiled for what comes first."""
    device = trainer.args.device
    model: Any = trainer.model
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        stance = torch.compiler.set_stance("force_eager" if config.compile else "default")
        with stance:
            yield
    for buffer, before in buffers:
        buffer.copy_(before)


def _way_out(trainer: LlavaTrainer, config: StageConfig, stage: str, batch: _Prepared, *, resumed: bool) -> str:
    """What did not fit, and the micro batch that does."""
    told = f"does not fit into the memory of {trainer.args.device}: {_described(trainer, batch)} found no room"
    less = (
        f"--{stage}.gradient_checkpointing true, more processes with --{stage}.engine fsdp2, a shorter "
        f"--{stage}.data.max_length, or LoRA (--{stage}.lora.rank 128)"
    )
    if resumed:
        return (
            f"{told}. The run goes on with the micro batches it began with: take a larger GPU, "
            f"--{stage}.gradient_checkpointing true, or more processes with --{stage}.engine fsdp2."
        )
    longest = sorted(batch, key=lambda sample: len(sample["input_ids"]), reverse=True)
    size = trainer.args.per_device_train_batch_size
    whole = size * trainer.args.gradient_accumulation_steps
    for smaller in (number for number in range(size - 1, 0, -1) if whole % number == 0):
        if _fits(trainer, config, longest[:smaller]):
            return f"{told}. {smaller} at a time fit: --{stage}.micro_batch_size {smaller} (batch_size stays)."
    return f"{told}, and not even one sample at a time fits; take {less}."


def _described(trainer: LlavaTrainer, batch: _Prepared) -> str:
    rows, length = trainer.data_collator(batch)["input_ids"].shape
    names = ", ".join(str(sample["id"]) for sample in batch[:3]) + (", …" if len(batch) > 3 else "")
    return f"the longest micro batch ({rows} x {length:,} positions, {_tiles(batch)} pictures; samples {names})"


def _sharded(trainer: LlavaTrainer, batch: _Prepared) -> str:
    return (
        f"the run does not fit into the memory of {trainer.args.device}: {_described(trainer, batch)} found no room. "
        "Set a smaller micro_batch_size, gradient_checkpointing: true, or take more processes."
    )
