"""Train a recipe: build the model, run the stages, leave a folder that can be loaded.

Every stage is built from files: the recipe's parts, and what the stage before it left. So a stage runs alike after
another one, in a folder of its own, or when a run that was interrupted goes on. `run_folder` says what a run's folder
holds, `docs/training.md` how runs are spread over processes and continued.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from integrations.llava.config import STAGES, Recipe, StageConfig
from integrations.llava.data import SampleFile, read_samples, sample_lengths, select_samples
from integrations.llava.data.doctor import usable_indices
from integrations.llava.modeling import Assembled, assemble, set_trainable
from integrations.llava.prompts import get_template
from layerfuse.errors import UserError

from .distributed import on_main, shared_failures
from .preflight import RANDOM, check_stages, find_connector, in_order
from .run_folder import RunFolder
from .signals import RunInterrupted, stop_requests
from .stage import Run, StageData, run_stage

__all__ = ["RANDOM", "Assembled", "assemble", "set_trainable", "train"]


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    stages: Sequence[str] = STAGES,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Run a recipe, or go on with a run that was interrupted.

    Under `torchrun` or `accelerate launch`, every process calls this. Nothing in the folder changes before the first
    step is made, and the folder is this run's alone while it lasts.

    Args:
        recipe: what to train, from `load_recipe`.
        output: the run's folder. If it holds an unfinished run of this recipe, that run goes on.
        stages: which stages to run; they run in the recipe's order, each once.
        adapter: weights of fuser and projector that the first stage asked for starts from, as an earlier `pretrain`
            wrote them; "random" for new ones, which a finetune without pretrain would otherwise refuse.
        overwrite: train these stages anew and remove what the folder holds of them; other stages stay.
        callbacks: of transformers' Trainer, for every stage.

    Returns:
        The folder.

    Raises:
        ValueError: if something in the recipe is not possible, the data are at fault, or the folder already holds
            another or a finished run, or is in use.
        FileNotFoundError: if a file of data or the adapter does not exist.
        ImportError: if a package is missing that the recipe needs.
        OSError: if the disk has no room for what the run will write.
        NonFiniteLossError: if a loss or gradient is NaN or infinite; the ids of the samples are in its message.
        RunInterrupted: if SIGTERM, SIGUSR1 or Ctrl-C arrived; the same call goes on from the step that was reached.
        ProcessFailedError: if another process of the run has failed otherwise.
    """
    cpu = not torch.cuda.is_available()
    folder, state = RunFolder(output), PartialState(cpu=cpu)
    locked = folder.locked() if state.is_main_process else nullcontext()
    with shared_failures(same=(UserError, RunInterrupted)), stop_requests() as request, locked:
        with request.at_once():
            asked = in_order(stages, recipe)
            left = on_main(lambda: folder.open(recipe, asked, overwrite=overwrite))
            on_main(lambda: check_stages(recipe, left, num_processes=state.num_processes, cpu=cpu, folder=folder.path))
            on_main(
                lambda: find_connector(folder, left[0], asked=asked, left=left, adapter=adapter, overwrite=overwrite)
            )
            data = {name: _read_and_check(folder, name, recipe.stage(name), overwrite) for name in left}
        run = Run(recipe, folder, data, asked, left, adapter, overwrite, callbacks, request, state)
        for name in left:
            run_stage(run, name)
    return folder.path


def _read_and_check(folder: RunFolder, name: str, config: StageConfig, overwrite: bool) -> StageData:
    """Open a stage's data; the main process reads and checks them for all."""

    def look() -> tuple[np.ndarray, str, np.ndarray | None]:
        # The first to open a file writes its index, which the others read.
        samples = read_samples(config.data.path)
        usable, _ = usable_indices(
            samples,
            image_folder=config.data.image_folder,
            template=get_template(config.template),
            check_images=config.data.check_images,
            bad_samples=config.data.bad_samples,
        )
        selected = select_samples(samples, usable)
        digest = _digest(samples, usable)
        if not overwrite:
            folder.check_samples(name, len(usable), digest)
        return usable, digest, sample_lengths(selected) if config.group_by_modality else None

    usable, digest, lengths = on_main(look)
    samples = read_samples(config.data.path)
    return StageData(select_samples(samples, usable), len(samples) - len(usable), digest, lengths)


def _digest(samples: SampleFile, usable: np.ndarray) -> str:
    """Digest samples as they are written, in their order: about a second for a gigabyte.

    Size and time of change would not do: an edit can keep both, a copy changes the time alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    for index in usable.tolist():
        raw = samples.raw(index)
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
