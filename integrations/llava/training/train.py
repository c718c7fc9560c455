"""Train a recipe: build the model, run the stages, leave a folder that can be loaded.

Every stage is built from files: the recipe's parts, and what the stage before it left. So a stage runs alike after
another one, in a folder of its own, or when a run that was interrupted goes on. `run_folder` says what a run's folder
holds, `docs/training.md` how runs are spread over processes and continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from integrations.llava.config import Recipe
from layerfuse.errors import UserError

from .distributed import on_main, shared_failures
from .plan import Plan, default_stages, in_order, noted_source, open_source
from .run_folder import RunFolder
from .run_status import noted_end
from .signals import RunInterrupted, stop_requests
from .stage import Stage
from .start import check_start
from .validation import Score

__all__ = ["train"]


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    stages: Sequence[str] | None = None,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    scores: Sequence[Score] = (),
) -> Path:
    """Run a recipe, or go on with a run that was interrupted.

    A recipe with a checkpoint (`load_recipe(overrides={"model.checkpoint": folder, …})`) goes on from that model.

    Under `torchrun` or `accelerate launch`, every process calls this. Nothing in the folder changes before the first
    step is made, and the folder is this run's alone while it lasts.

    Args:
        recipe: from `load_recipe`.
        output: the run's folder. If it holds an unfinished run of this recipe, that run goes on.
        stages: which to run; they run in the recipe's order, each once. None: all, or `finetune` where the recipe goes
            on from a model.
        adapter: weights of fuser and projector that the first stage asked for starts from, as an earlier `pretrain`
            wrote them; "random" for new ones, which a finetune without pretrain would otherwise refuse.
        overwrite: train these stages anew and remove what the folder holds of them; other stages stay.
        callbacks: of transformers' Trainer, for every stage.
        scores: measured whenever a stage that asks questions is evaluated, as its `validation` says.

    Returns:
        The run's folder.

    Raises:
        ValueError: if something in the recipe is not possible, or the data are at fault (all of it in one message), or
            the folder already holds another or a finished run, or is in use.
        FileNotFoundError: if a file of data or the adapter does not exist.
        ImportError: if a package is missing that the recipe needs.
        OSError: if the disk has no room for what the run will write.
        NonFiniteLossError: if a loss or gradient is NaN or infinite; the ids of the samples are in its message.
        RunInterrupted: if SIGTERM, SIGUSR1 or Ctrl-C arrived; the same call goes on from the step that was reached.
        ProcessFailedError: if another process of the run has failed otherwise.
    """
    folder, process = RunFolder(output), PartialState(cpu=not torch.cuda.is_available())
    locked = folder.locked() if process.is_main_process else nullcontext()
    with shared_failures(same=(UserError, RunInterrupted)), stop_requests() as request, locked, noted_end(folder):
        with request.at_once():
            asked = in_order(default_stages(recipe, folder) if stages is None else stages, recipe)
            source = open_source(recipe, folder)
            recipe = noted_source(source.resolved(recipe), source)
            left = on_main(lambda: folder.open(recipe, asked, overwrite=overwrite))
            plan = Plan(recipe, source, folder, asked, left, adapter, overwrite, callbacks, request, process, scores)
            ahead = [Stage(plan, name) for name in left]
            for stage, found in zip(ahead, on_main(lambda: check_start(plan, ahead)), strict=True):
                stage.open_samples(*found)
        for stage in ahead:
            stage.prepare()
            stage.run()
            stage.save()
    return folder.path
