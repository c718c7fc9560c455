"""A stage measured while it trains: loss and scores at intervals, the best evaluation, an end where none is better.

The log is the memory: what was measured before a checkpoint is read back from metrics.jsonl, so that a run that goes
on decides as one that was never interrupted.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaProcessor, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava._files import json_lines
from integrations.llava.config import StageConfig
from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from layerfuse.errors import InputError
from layerfuse.registry import unknown_name_message

from .best import BestWeights
from .distributed import on_main
from .held_out import LOSS, held_out_losses
from .trainer import LlavaTrainer

__all__ = ["Measured", "Score", "Validation", "check_validation"]

_log = logging.getLogger(__name__)

# As transformers' reporters know that a number is none of training's.
_PREFIX = "eval_"


@dataclass(frozen=True)
class Score:
    """A number that says how well the model in training does something; the more the better.

    Attributes:
        name: of the score; its key in the log begins with `eval_`.
        measure: computes it from the model, in evaluation mode, and the processor that would be saved with it. One
            process calls it, on the model's device; model and processor have to stay as they are.
    """

    name: str
    measure: Callable[[FusedLlavaForConditionalGeneration, LlavaProcessor], float]


@dataclass(frozen=True)
class Measured:
    """An evaluation: the step after which it was made, and the number that the best one is told by."""

    step: int
    value: float


def check_validation(config: StageConfig, scores: Sequence[Score], *, num_processes: int) -> None:
    """Raise a ValueError if a stage cannot be evaluated as its settings say, with these scores."""
    validation = config.validation
    names = [LOSS] * bool(validation.path) + [score.name for score in scores]
    if validation.decides and not names:
        raise InputError(
            "validation.keep_best and validation.patience compare evaluations, and there are none; name held-out "
            "samples (--eval-data FILE) or a task (--eval-task), or leave both settings out."
        )
    if validation.decides and validation.best_by not in names:
        raise InputError(unknown_name_message("validation.best_by", validation.best_by, names))
    if scores and num_processes > 1 and config.engine != "ddp":
        raise InputError(
            f"a score is measured by one process, which needs the whole model, and engine {config.engine!r} may take "
            "it apart; use 'ddp', or leave the score out (--eval-task) and evaluate when training has ended."
        )


class Validation(TrainerCallback):
    """Measures a stage at intervals, keeps the weights of the best evaluation, ends training after too many worse ones.

    Nothing that training draws from or computes with changes: its losses are the same with and without.

    Args:
        trainer: of the stage; its `eval_dataset` are the held-out samples, if any, and numbers go into its log.
        config: of the stage.
        folder: of the run.
        stage: name of the stage.
        scores: measured as well as the loss.
        processor: makes what scores are given beside the model.
    """

    def __init__(
        self,
        trainer: LlavaTrainer,
        config: StageConfig,
        folder: Path,
        stage: str,
        *,
        scores: Sequence[Score] = (),
        processor: Callable[[], LlavaProcessor],
    ) -> None:
        self.trainer, self.config, self.validation = trainer, config, config.validation
        self.log, self.stage, self.scores, self.processor = folder / "metrics.jsonl", stage, scores, processor
        self.weights: BestWeights | None = None
        if self.validation.keep_best:
            self.weights = BestWeights(folder / stage, is_main_process=trainer.is_world_process_zero())
        self.history: list[Measured] = []

    @property
    def best(self) -> Measured | None:
        """The best evaluation, of equals the first; one before the first step does not count."""
        return self._best_of(self.history)

    def note(self) -> dict[str, float] | None:
        """Steps of the best evaluation and of the end, for the run's folder; None where nothing was measured."""
        best = self.best
        if best is None:
            return None
        return {"step": best.step, self.validation.best_by: best.value, "last_step": self.trainer.state.global_step}

    def best_weights(self) -> dict[str, torch.Tensor] | None:
        """Trained weights that the stage leaves in place of its last ones, on the CPU; None leaves those."""
        if self.weights is None or (best := self.best) is None:
            return None
        last = self.trainer.state.global_step
        _log.info(
            "stage %s leaves the weights of step %d, its best evaluation (%s %.4f); its last step was %d",
            *(self.stage, best.step, self.validation.best_by, best.value, last),
        )
        return None if best.step == last else self.weights.read(best.step)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read what was measured up to the checkpoint; make up for an evaluation that a request to stop left out."""
        step = state.global_step
        self.history = on_main(partial(self._logged, step)) if step else []
        if self.weights is not None and (best := self.best) is not None:
            self.weights.check(best.step)
        due = self._is_due(state) if step else self.validation.at_start
        if due and step not in {each.step for each in self.history}:
            self._evaluate(state, control)
        self._stop_if_no_better(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate if it is time, unless the run was told to stop: then it is made up for when the run goes on."""
        told_to_stop = control.should_training_stop and state.global_step < state.max_steps
        if self._is_due(state) and not told_to_stop:
            self._evaluate(state, control)
            self._stop_if_no_better(state, control)

    def _is_due(self, state: TrainerState) -> bool:
        every = self.validation.every or max(state.max_steps // 10, 1)
        return state.global_step % every == 0 or state.global_step >= state.max_steps

    def _logged(self, until: int) -> list[Measured]:
        """Read evaluations up to a step; lines behind it are of steps that are made again."""
        rows = [row for _, row in json_lines(self.log, growing=True)] if self.log.is_file() else []
        own = [row for row in rows if row["stage"] == self.stage and row["step"] <= until]
        key = _PREFIX + self.validation.best_by
        return [Measured(row["step"], row.get(key, math.nan)) for row in own if any(k.startswith(_PREFIX) for k in row)]

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        started = time.monotonic()
        with _same_draws():
            numbers = {}
            if self.trainer.eval_dataset is not None:
                numbers = held_out_losses(self.trainer, in_step=self.config.engine == "zero3")
            numbers |= {score.name: on_main(partial(self._measure, score)) for score in self.scores}
        row = {"step": state.global_step} | {_PREFIX + name: value for name, value in numbers.items()}
        self.trainer.noted.append(row | {"seconds": time.monotonic() - started})
        # The steps before it are written now, and the evaluation behind them.
        control.should_log = True
        self.history.append(Measured(state.global_step, numbers.get(self.validation.best_by, math.nan)))
        if self.weights is not None and self.best == self.history[-1]:
            self.weights.keep(self.trainer.model_wrapped, state.global_step, needed=self._best_steps)

    def _measure(self, score: Score) -> float:
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        bf16 = self.config.precision == "bf16"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            return float(score.measure(model.eval(), self.processor()))

    def _best_of(self, history: Sequence[Measured]) -> Measured | None:
        better = min if self.validation.best_by == LOSS else max
        able = [each for each in history if each.step and math.isfinite(each.value)]
        return better(able, key=lambda each: each.value, default=None)

    def _best_steps(self, checkpoints: Sequence[int]) -> set[int]:
        """Steps whose weights a run needs that goes on from one of these checkpoints."""
        bests = [self._best_of([each for each in self.history if each.step <= step]) for step in checkpoints]
        return {best.step for best in bests if best is not None}

    def _stop_if_no_better(self, state: TrainerState, control: TrainerControl) -> None:
        best, patience = self.best, self.validation.patience
        since = 0 if best is None else best.step
        worse = sum(each.step > since for each in self.history)
        if patience is None or worse < patience or state.global_step >= state.max_steps:
            return
        _log.info(
            "stage %s ends at step %d of %d: %d evaluations in a row were no better than that of step %d "
            "(validation.patience)",
            *(self.stage, state.global_step, state.max_steps, worse, since),
        )
        control.should_training_stop = True


@contextmanager
def _same_draws() -> Iterator[None]:
    """Leave random numbers to come as they would be without the block."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
