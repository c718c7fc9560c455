"""What can be known of a run before its data are read: names, packages, settings, and where each stage starts from.

Every stage is built on the meta device and its TrainingArguments are made, so that what is wrong with the second stage
is not found after the first one's hours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import SchedulerType, get_scheduler

from integrations.llava.config import STAGES, Recipe, StageConfig
from integrations.llava.modeling import build_recipe_model, quantization_config, read_language_files
from integrations.llava.prompts import get_template
from layerfuse.errors import InputError, MissingFileError, MissingPackageError, UserError
from layerfuse.files import file_digest
from layerfuse.registry import unknown_name_message

from .arguments import training_arguments
from .engines import check_engine, forget_engine
from .run_folder import RunFolder

__all__ = ["RANDOM", "Connector", "check_stages", "find_connector", "in_order"]

RANDOM = "random"
"""Said in place of an adapter's file: fuser and projector start from random weights."""


def in_order(stages: Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """Bring stages into the order in which they are trained, each once.

    Raises:
        ValueError: if a name is unknown, or none is given.
    """
    for name in stages:
        recipe.stage(name)
    if not stages:
        raise InputError(f"no stage was asked for; give {' or '.join(STAGES)}.")
    return tuple(name for name in STAGES if name in stages)


def check_stages(recipe: Recipe, stages: Sequence[str], *, num_processes: int, cpu: bool, folder: Path) -> None:
    """Build every stage without allocating it, and all that its training is told.

    Args:
        recipe: what is to be trained.
        stages: which of its stages.
        num_processes: how many share the run.
        cpu: whether they compute on the CPU.
        folder: of the run; not written to.

    Raises:
        ValueError: if something in the recipe is not possible; the stage is named.
        ImportError: if a package is missing.
    """
    for name in stages:
        with _named(name):
            config = recipe.stage(name)
            config.batches(num_processes)
            check_engine(config.engine, num_processes=num_processes, cpu=cpu, quantized=config.lora.quantize != "none")
            get_template(config.template)
            _check_scheduler(config)
            if quantization_config(config.lora.quantize, torch.float32) and not recipe.model.llm_pretrained:
                raise InputError("quantised weights need a pretrained language model; set model.llm_pretrained.")
            if not config.data.path:
                raise InputError(f"no data; give --{name}.data.path FILE and --{name}.data.image_folder FOLDER.")
    files = read_language_files(recipe.model)
    for name in stages:
        with _named(name):
            config = recipe.stage(name)
            model = build_recipe_model(recipe.model, files, config, device="meta")
            try:
                training_arguments(config, folder / name, model, num_processes)
            except UserError:
                raise
            except (ValueError, ImportError) as error:
                raise InputError(f"transformers cannot train with these settings: {error}") from error
            finally:
                forget_engine()


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Put the stage's name in front of what is wrong with it."""
    try:
        yield
    except MissingPackageError as error:
        raise MissingPackageError(f"stage {stage}: {error}") from error
    except InputError as error:
        raise InputError(f"stage {stage}: {error}") from error


def _check_scheduler(config: StageConfig) -> None:
    known = {kind.value for kind in SchedulerType} - {SchedulerType.REDUCE_ON_PLATEAU.value}
    if config.scheduler not in known:
        raise InputError(unknown_name_message("scheduler", config.scheduler, known))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        get_scheduler(config.scheduler, optimizer, num_warmup_steps=1, num_training_steps=4)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"scheduler {config.scheduler!r} wants settings that a recipe does not have ({error}); take another, such "
            "as cosine, linear or constant_with_warmup."
        ) from error


@dataclass(frozen=True)
class Connector:
    """What a stage's fuser and projector start from.

    Attributes:
        path: a file; None for new weights.
        note: remembered in the run's folder: the digest of the file and its name, or `RANDOM`.
        before: the stage that wrote it, if one of this folder did.
    """

    path: Path | None
    note: str
    before: str | None = None


def find_connector(
    folder: RunFolder,
    stage: str,
    *,
    asked: Sequence[str],
    left: Sequence[str],
    adapter: str | Path | None,
    overwrite: bool,
) -> Connector | None:
    """Say what a stage starts from; without a word from the user, no stage but the first starts from random weights.

    Args:
        folder: of the run.
        stage: its name.
        asked: all stages asked for, in order; the adapter is the first one's.
        left: those that are to be run.
        adapter: a file, `RANDOM`, or None.
        overwrite: whether what the folder holds of the stage is replaced.

    Returns:
        The connector; None if the stage before it has still to write it.

    Raises:
        ValueError: if there is nothing to start from, or the stage began from something else.
        FileNotFoundError: if the adapter is not there.
    """
    before = STAGES[STAGES.index(stage) - 1] if STAGES.index(stage) else None
    goes_on = folder.checkpoint(stage) is not None and not overwrite
    noted = folder.origin(stage) if goes_on else None
    given = adapter if stage == asked[0] else None
    found: Connector
    if given is not None:
        found = _of_file(Path(given)) if str(given) != RANDOM else Connector(None, RANDOM)
    elif before is not None and before in folder.finished and not (overwrite and before in left):
        found = _of_file(folder.adapter(before), before)
    elif before is not None and before in left:
        return None
    elif noted is not None and noted != RANDOM:
        found = _of_file(Path(noted.partition(" ")[2]))
    elif before is None or goes_on:
        found = Connector(None, RANDOM)
    else:
        raise InputError(
            f"stage {stage} has no fuser and projector to start from: {folder.path} holds no finished {before}. Run "
            f"both (--stages {before} {stage}), name a file (--adapter RUN/{before}/adapter.safetensors), or say that "
            f"they start from random weights (--adapter {RANDOM})."
        )
    if noted is not None and noted.partition(" ")[0] != found.note.partition(" ")[0]:
        raise InputError(
            f"stage {stage} of {folder.path} began from {_words(noted)}, and now it would go on from "
            f"{_words(found.note)}, which is not the same. Give the one it began from, or another folder (--output)."
        )
    if overwrite and found.path is not None and found.before is None:
        removed = [folder.path.resolve() / name for name in left]
        if any(place in found.path.resolve().parents for place in removed):
            raise InputError(
                f"the adapter {found.path} is part of what --overwrite would remove; copy it elsewhere first, or give "
                "another folder (--output)."
            )
    return found


def _of_file(path: Path, before: str | None = None) -> Connector:
    if not path.is_file():
        raise MissingFileError(f"adapter {path} does not exist; run the stage that writes it first.")
    return Connector(path, f"{file_digest(path).hex()} {path.absolute()}", before)


def _words(note: str) -> str:
    return "random weights" if note == RANDOM else note.partition(" ")[2]
