"""The plan of a start: which stages it runs, and what fuser and projector of each begin from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from integrations.llava.checkpoints import Checkpoint, model_source
from integrations.llava.config import STAGES, Recipe
from integrations.llava.modeling import ModelSource
from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import file_digest

from .distributed import on_main
from .run_folder import RunFolder
from .signals import StopRequest
from .validation import Score

__all__ = [
    "RANDOM",
    "ConnectorOrigin",
    "Plan",
    "default_stages",
    "find_origin",
    "in_order",
    "noted_source",
    "open_source",
]

RANDOM = "random"
"""Said in place of an adapter's file: fuser and projector start from random weights."""
# Noted in a run's folder, likewise: they start as the checkpoint has them that the run goes on from.
_CHECKPOINT = "checkpoint"
_WORDS = {RANDOM: "random weights", _CHECKPOINT: "those of the model that the run goes on from"}


@dataclass(frozen=True)
class Plan:
    """One call of `train`, as all of its stages see it.

    Attributes:
        recipe: what is trained.
        source: of its model.
        folder: of the run.
        asked: stages asked for, in their order.
        left: those of them that are not finished.
        adapter: what the first stage asked for starts from: a file, `RANDOM`, or None.
        overwrite: whether earlier results of the stages are replaced.
        scores: measured in stages that ask questions.
    """

    recipe: Recipe
    source: ModelSource
    folder: RunFolder
    asked: Sequence[str]
    left: Sequence[str]
    adapter: str | Path | None
    overwrite: bool
    callbacks: Sequence[TrainerCallback]
    request: StopRequest
    process: PartialState
    scores: Sequence[Score] = ()

    def replaces(self, stage: str) -> bool:
        """Whether a stage's first step removes earlier results: those of all stages go with the first one's."""
        return self.overwrite and stage == self.left[0]


@dataclass(frozen=True)
class ConnectorOrigin:
    """Weights that a stage's fuser and projector start from.

    Attributes:
        path: a file; None for the weights that the model has when it is built.
        note: for the run's folder: the digest of the file and its name, `RANDOM`, or `_CHECKPOINT`.
        before: the stage that wrote it, if one of this folder did.
    """

    path: Path | None
    note: str
    before: str | None = None


def default_stages(recipe: Recipe, folder: RunFolder) -> tuple[str, ...]:
    """Stages that are meant where none is said: the recipe's, and those that the folder has begun with."""
    return tuple(name for name in STAGES if name in recipe.default_stages or folder.begun(name))


def in_order(stages: Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """Stages in the order in which they are trained, each once; a ValueError if a name is unknown, or none is given."""
    for name in stages:
        recipe.stage(name)
    if not stages:
        raise InputError(f"no stage was asked for; give {' or '.join(STAGES)}.")
    return tuple(name for name in STAGES if name in stages)


def open_source(recipe: Recipe, folder: RunFolder) -> ModelSource:
    """Where the run's model comes from.

    Raises:
        FileNotFoundError: if the model to go on from is not there.
        ValueError: if it cannot be read, or lies where the run would write.
    """
    start = Path(recipe.model.checkpoint).resolve()
    if recipe.model.checkpoint and start in (own := folder.path.resolve(), *(own / stage for stage in STAGES)):
        raise InputError(
            f"{recipe.model.checkpoint} is the model to go on from and the run's own folder, where the new model will "
            "be written; give another folder (--output)."
        )
    try:
        return model_source(recipe.model)
    except MissingFileError as error:
        began = folder.checkpoint_of_run()
        if began is None or began[0] != recipe.model.checkpoint:
            raise
        raise MissingFileError(
            f"{folder.path} began from {began[0]}, which is not there any more ({error}) Checkpoints hold what is "
            "trained, and the rest comes from there: bring it back, or say where it is now (--from)."
        ) from error


def noted_source(recipe: Recipe, source: ModelSource) -> Recipe:
    """The recipe with the digest of the model that it goes on from, if it does, which the main process reads for all.

    Raises:
        ValueError: if the recipe was written for other weights.
    """
    if not isinstance(source, Checkpoint):
        return recipe
    digest = on_main(lambda: source.digest)
    if (noted := recipe.model.checkpoint_digest) not in ("", digest):
        raise InputError(
            f"{recipe.model.checkpoint} has the digest {digest}, and the recipe was written for a model with {noted}: "
            "its files have changed since. Bring them back, or leave model.checkpoint_digest out of a recipe for a new "
            "run."
        )
    return replace(recipe, model=replace(recipe.model, checkpoint_digest=digest))


def find_origin(plan: Plan, stage: str) -> ConnectorOrigin | None:
    """What a stage starts from, or None if the stage before it has still to write it.

    Without a word from the user, no stage but the first starts from random weights.

    Raises:
        ValueError: if there is nothing to start from, or the stage began from something else.
        FileNotFoundError: if the adapter is not there.
    """
    folder, fresh = plan.folder, plan.replaces(stage)
    before = STAGES[STAGES.index(stage) - 1] if STAGES.index(stage) else None
    goes_on = folder.checkpoint(stage) is not None and not fresh
    noted = folder.origin(stage) if goes_on else None
    given = plan.adapter if stage == plan.asked[0] else None
    if given is not None and str(given) == RANDOM and plan.source.has_connector:
        raise InputError(
            f"--adapter {RANDOM} asks for a new fuser and projector, and the run goes on from a model that has both; "
            "leave one or the other out."
        )
    if given is not None:
        origin = ConnectorOrigin(None, RANDOM) if str(given) == RANDOM else _of_file(Path(given))
    elif before is not None and before in folder.finished and not (fresh and before in plan.left):
        origin = _of_file(folder.adapter(before), before)
    elif before is not None and before in plan.left:
        return None
    elif noted is not None and noted not in _WORDS:
        origin = _of_file(Path(noted.partition(" ")[2]))
    elif plan.source.has_connector:
        origin = ConnectorOrigin(None, _CHECKPOINT)
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
    if path.is_dir():
        raise InputError(
            f"the adapter {path} is a folder; name the file of fuser and projector in it "
            "(RUN/STAGE/adapter.safetensors), or go on from the whole model (--from)."
        )
    if not path.is_file():
        raise MissingFileError(f"adapter {path} does not exist; run the stage that writes it first.")
    return ConnectorOrigin(path, f"{file_digest(path).hex()} {path.absolute()}", before)


def _words(note: str) -> str:
    return _WORDS.get(note) or note.partition(" ")[2]
