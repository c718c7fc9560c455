"""Training and evaluating one fuser with one seed, unless the folder holds the same already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava._files import json_lines
from integrations.llava.checkpoints import load_model
from integrations.llava.config import STAGES, Recipe
from integrations.llava.evaluation import evaluate, read_predictions, read_questions, score_answers, summarise
from integrations.llava.synthetic import KINDS
from integrations.llava.training import RunFolder, train
from layerfuse.errors import MissingFileError

from .fingerprint import begin, code_digest, digest, file_digest, finished, folder_digest, mark_finished
from .results import FuserRun

__all__ = ["finish_run", "read_run"]

_LOG = logging.getLogger(__name__)
# Parts that are noted: training has begun to write, training is finished, all questions are answered.
_BEGUN, _TRAINING, _EVALUATION = "begun", "training", "evaluation"


def finish_run(recipe: Recipe, folder: Path, data: Path) -> FuserRun:
    """Train and evaluate, each only if the folder does not hold the same part already; `data` is the data set's folder.

    Raises:
        FileExistsError: if the folder holds files that no demo wrote.
    """
    training = _train(recipe, folder, data)
    questions_file = data / "test.jsonl"
    parts = {"training": training, "code": code_digest("evaluation"), "questions": file_digest(questions_file)}
    evaluation = digest(parts)
    if finished(folder, _EVALUATION, evaluation) is None:
        started = time.perf_counter()
        evaluate(folder, questions_file, data / "images", output=folder / _EVALUATION, overwrite=True)
        mark_finished(folder, _EVALUATION, evaluation, {"evaluation": time.perf_counter() - started})
    else:
        _LOG.info("%s: answers are there already", folder.name)
    return read_run(recipe, folder, data)


def read_run(recipe: Recipe, folder: Path, data: Path) -> FuserRun:
    """Read what a finished run answered, whatever code trained it.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
    """
    noted = [finished(folder, part, None) for part in (_TRAINING, _EVALUATION)]
    if None in noted:
        raise MissingFileError(
            f"{folder} holds no finished run of a demo, so there is nothing to draw; give the fusers, seeds and output "
            "of one that is finished, or leave --redraw out, which trains."
        )
    questions_file = data / "test.jsonl"
    predictions = read_predictions(folder / _EVALUATION / "predictions.jsonl")
    answers = score_answers(read_questions(questions_file), predictions)
    kinds = summarise(answers)
    losses: dict[str, list[tuple[int, float]]] = {}
    for _, row in json_lines(folder / "metrics.jsonl"):
        if "loss" in row:  # an evaluation has none
            losses.setdefault(row["stage"], []).append((row["step"], row["loss"]))
    model = load_model(folder).model
    backbone = model.vision_tower.backbone
    return FuserRun(
        fuser=recipe.model.fuser,
        seed=recipe.finetune.seed,
        folder=str(folder),
        layers=tuple(backbone.layers),
        # In the data set's own order, whatever the first image asks.
        kinds={kind: kinds[kind] for kind in sorted(kinds, key=KINDS.index)},
        answers=answers,
        losses=losses,
        seconds={part: taken for notes in noted for part, taken in (notes or {}).items()},
        cost=asdict(model.fuser.cost(model.fuser_grids)),
    )


def _backbones(recipe: Recipe) -> tuple[str, ...]:
    named = recipe.model.backbone
    return named if isinstance(named, tuple) else (named,)


def _fingerprint(recipe: Recipe, data: Path) -> str:
    """Digest of all that the result of a training depends on."""
    settings = asdict(recipe)
    for stage in STAGES:
        # Where maps are kept changes nothing; how they are rounded there (feature_cache_dtype) does.
        del settings[stage]["feature_cache"]
    return digest(
        {
            "recipe": settings,
            "data": {name: file_digest(data / name) for name in ("settings.json", "pretrain.json", "train.json")},
            "weights": {name: folder_digest(name) for name in (*_backbones(recipe), recipe.model.llm)},
            "code": code_digest("training"),
        }
    )


def _train(recipe: Recipe, folder: Path, data: Path) -> str:
    fingerprint = _fingerprint(recipe, data)
    if finished(folder, _TRAINING, fingerprint) is not None:
        _LOG.info("%s: trained already with these settings", folder.name)
        return fingerprint
    seconds = {}
    if finished(folder, _BEGUN, fingerprint) is None:
        if (folder / "recipe.yaml").exists():
            _LOG.info("%s: settings, data or code have changed: training anew", folder.name)
        begin(folder)
        watch = _Stopwatch(lambda: mark_finished(folder, _BEGUN, fingerprint, {}))
        _LOG.info("%s: training", folder.name)
        train(recipe, folder, overwrite=True, callbacks=[watch])
        seconds = dict(zip(STAGES, watch.seconds, strict=True))
    elif set(RunFolder(folder).finished) < set(STAGES):
        # What the broken-off part took is not known, so no seconds are noted.
        _LOG.info("%s: training was broken off: going on", folder.name)
        train(recipe, folder)
    mark_finished(folder, _TRAINING, fingerprint, seconds)
    return fingerprint


class _Stopwatch(TrainerCallback):
    """Notes how long each stage trains, in seconds, without loading and saving; calls `begun` before its first step."""

    def __init__(self, begun: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self._begun = begun
        self._started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun()
        self._started = time.perf_counter()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)
