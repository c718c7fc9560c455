"""The plan of a start: which stages it runs, and what the fuser and projector of each begin from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from integrations.llava.config import STAGES, Recipe
from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import file_digest

from .run_folder import RunFolder
from .signals import StopRequest

__all__ = ["RANDOM", "ConnectorOrigin", "Plan", "find_origin", "in_order"]

RANDOM = "random"
"""Said in place of an adapter's file: fuser and projector start from random weights."""


@dataclass(frozen=True)
class Plan:
    """One call of `train`, as all of its stages see it.

    Attributes:
        recipe: what is trained.
        folder: of the run.
        asked: stages asked for, in their order.
        left: those of them that are not finished.
        adapter: what the first stage asked for starts from: a file, `RANDOM`, or None.
        overwrite: whether earlier results of the stages are replaced.
        callbacks: of transformers' Trainer.
        request: whether this process was asked to stop.
        process: rank and number of the processes.
    """

    recipe: Recipe
    folder: RunFolder
    asked: Sequence[str]
    left: Sequence[str]
    adapter: str | Path | None
    overwrite: bool
    callbacks: Sequence[TrainerCallback]
    request: StopRequest
    process: PartialState

    def replaces(self, stage: str) -> bool:
        """Whether a stage's first step removes what the folder holds of it: all stages' results go with the first's."""
        return self.overwrite and stage == self.left[0]


@dataclass(frozen=True)
class ConnectorOrigin:
    """Weights that a stage's fuser and projector start from.

    Attributes:
        path: a file; None for new weights.
        note: remembered in the run's folder: the digest of the file and its name, or `RANDOM`.
        before: the stage that wrote it, if one of this folder did.
    """

    path: Path | None
    note: str
    before: str | None = None


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


def find_origin(plan: Plan, stage: str) -> ConnectorOrigin | None:
    """Find what a stage starts from; without a word from the user, no stage but the first starts from random weights.

    Returns:
        The origin; None if the stage before it has still to write it.

    Raises:
        ValueError: if there is nothing to start from, or the stage began from something else.
        FileNotFoundError: if the adapter is not there.
    """
    folder, fresh = plan.folder, plan.replaces(stage)
    before = STAGES[STAGES.index(stage) - 1] if STAGES.index(stage) else None
    goes_on = folder.checkpoint(stage) is not None and not fresh
    noted = folder.origin(stage) if goes_on else None
    given = plan.adapter if stage == plan.asked[0] else None
    if given is not None:
        origin = ConnectorOrigin(None, RANDOM) if str(given) == RANDOM else _of_file(Path(given))
    elif before is not None and before in folder.finished and not (fresh and before in plan.left):
        origin = _of_file(folder.adapter(before), before)
    elif before is not None and before in plan.left:
        return None
    elif noted is not None and noted != RANDOM:
        origin = _of_file(Path(noted.partition(" ")[2]))
    elif before is None or goes_on:
        origin = ConnectorOrigin(None, RANDOM)
    else:
        raise InputError(
            f"stage {stage} has no fuser and projector to start from: {folder.path} holds no finished {before}. Run "
            f"both (--stages {before} {stage}), name a file (--adapter RUN/{before}/adapter.safetensors), or say that "
            f"they start from random weights (--adapter {RANDOM})."
        )
    if noted is not None and noted.partition(" ")[0] != origin.note.partition(" ")[0]:
        raise InputError(
            f"stage {stage} of {folder.path} began from {_words(noted)}, and now it would go on from "
            f"{_words(origin.note)}, which is not the same. Give the one it began from, or another folder (--output)."
        )
    if fresh and origin.path is not None and origin.before is None:
        removed = {folder.path.resolve() / name for name in plan.left}
        if removed & {*origin.path.resolve().parents}:
            raise InputError(
                f"the adapter {origin.path} is part of what --overwrite would remove; copy it elsewhere first, or give "
                "another folder (--output)."
            )
    return origin


def _of_file(path: Path, before: str | None = None) -> ConnectorOrigin:
    if not path.is_file():
        raise MissingFileError(f"adapter {path} does not exist; run the stage that writes it first.")
    return ConnectorOrigin(path, f"{file_digest(path).hex()} {path.absolute()}", before)


def _words(note: str) -> str:
    return "random weights" if note == RANDOM else note.partition(" ")[2]
