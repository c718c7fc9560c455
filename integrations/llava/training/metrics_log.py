"""The log of a run: a line per optimizer step and evaluation, transformers' reporters, a bar, lines for people."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from integrations.llava._files import json_lines
from layerfuse.errors import InputError, MissingPackageError
from layerfuse.files import write_text
from layerfuse.registry import unknown_name_message

from .progress import Progress, describe_evaluation
from .trainer import LlavaTrainer

__all__ = ["RunLog", "check_reporters"]

_log = logging.getLogger(__name__)


def check_reporters(names: Iterable[str]) -> None:
    """Refuse reporters that transformers does not know (ValueError), or whose package is not there (ImportError)."""
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(unknown_name_message("report_to", name, INTEGRATION_TO_CALLBACK))
        if name not in installed:
            raise MissingPackageError(
                f"report_to names {name!r}, whose package is not installed; install it, or set report_to to some of "
                f"{', '.join(installed) or 'those that are'}, or to [] for none."
            )


class RunLog(TrainerCallback):
    """Writes every step's loss to a JSON lines file and to reporters, and says how the stage gets on.

    A line holds `stage`, `step`, `loss` (over all processes), `learning_rate`, `grad_norm` (before clipping) and, where
    samples were left out, `skipped`; that of an evaluation `stage`, `step` and what was measured, `eval_loss` and so
    on. Lines are written when Trainer logs and before every checkpoint, so that a run which goes on from one continues
    the file without gap or repetition. Add it after all callbacks that may ask for a checkpoint.

    For people there is a bar in a terminal, elsewhere a line in Python's log whenever Trainer logs, and each of these
    lines, with the time, in `train.log`, which only grows: it also shows steps that were made again.

    Args:
        folder: of the run: gets `metrics.jsonl` and `train.log`, appended to, and TensorBoard files under
            `logs/<stage>`.
        report_to: transformers' names of reporters. Trainer itself must have none: it would start them before the
            first step, and tell them one step in `logging_steps`.
    """

    def __init__(self, trainer: LlavaTrainer, folder: Path, stage: str, *, report_to: Sequence[str] = ()) -> None:
        self.trainer, self.folder, self.stage, self.report_to = trainer, folder, stage, report_to
        self.file, self.text = folder / "metrics.jsonl", folder / "train.log"
        self.num_skipped = self.start = 0
        self.reporters: list[TrainerCallback] | None = None
        self.bar: tqdm[Any] | None = None
        self.progress: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar; files change when there is something to write, after the first step."""
        if state.is_world_process_zero:
            self.start = state.global_step
            self.progress = Progress(self.stage, self.start, state.max_steps)
            self.bar = tqdm(total=state.max_steps, desc=self.stage, unit="step", disable=None, initial=self.start)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar, and write before a checkpoint is."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if control.should_save:
            self._write(args, state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the steps since the last entry, and say how the stage gets on."""
        self._write(args, state)
        self._say_progress()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the last steps, warn of skipped samples, close bar and reporters."""
        self.on_log(args, state, control)
        if self.bar is not None:
            self.bar.close()
            self._tell("on_train_end", args, state)
            if self.num_skipped:
                _log.warning("stage %s: %d samples were skipped", self.stage, self.num_skipped)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the steps that are not yet; every process has to call this."""
        rows = self.trainer.take_rows()
        if rows and self.bar is not None:
            if self.reporters is None:
                # What an interrupted run logged after its last checkpoint is forgotten.
                self._rewind(self.start)
                self._append(f"{self.stage} {f'goes on behind step {self.start}' if self.start else 'begins'}")
                kinds = dict(zip(self.report_to, get_reporting_integration_callbacks([*self.report_to]), strict=True))
                logs = str(self.folder / "logs" / self.stage)
                self.reporters = [
                    kind(SummaryWriter(logs, purge_step=self.start + 1)) if name == "tensorboard" else kind()
                    for name, kind in kinds.items()
                ]
                self._tell("on_init_end", args, state)
                self._tell("on_train_begin", args, state)
            rows = [self._counted(row) for row in rows]
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(_line({"stage": self.stage} | row) for row in rows)
            for row in rows:
                state_then = copy.copy(state)
                state_then.global_step = int(row["step"])
                self._tell("on_log", args, state_then, logs={key: row[key] for key in row if key != "step"})
            self.num_skipped += _skipped(rows)
        self.trainer.stop_if_gradients_broke()

    def _counted(self, row: Mapping[str, float]) -> dict[str, float]:
        """The row as the file has it; what it says of speed, which no two starts have alike, goes into the lines."""
        kept = dict(row)
        samples, tokens, seconds = (kept.pop(key, 0.0) for key in ("samples", "tokens", "seconds"))
        assert self.progress is not None and self.bar is not None
        if "loss" in kept:
            self.progress.add(kept, samples=samples, tokens=tokens)
            return kept
        self.progress.pause(seconds)
        self._say_progress()
        line = describe_evaluation(self.stage, kept, seconds)
        self._append(line)
        if self.bar.disable:
            _log.info("%s", line)
        else:
            self.bar.write(line)
        return kept

    def _say_progress(self) -> None:
        if self.progress is None or (parts := self.progress.parts()) is None:
            return
        assert self.bar is not None
        self._append("  ".join(parts))
        if self.bar.disable:
            _log.info("%s", "  ".join(parts))
        else:  # which shows steps and the time left itself
            self.bar.set_postfix_str("  ".join(parts[1:-1]), refresh=False)

    def _append(self, line: str) -> None:
        with self.text.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%F %T')}  {line}\n")

    def _tell(self, event: str, args: TrainingArguments, state: TrainerState, **given: Any) -> None:
        for reporter in self.reporters or ():
            getattr(reporter, event)(args, state, TrainerControl(), model=self.trainer.model, **given)

    def _rewind(self, step: int) -> None:
        """Remove this stage's lines behind a step, or all where it begins anew, and a last one that was cut off."""
        rows = [row for _, row in json_lines(self.file, growing=True)] if self.file.is_file() else []
        kept = [row for row in rows if row["stage"] != self.stage or 0 < step >= row["step"]]
        rewound = "".join(map(_line, kept))
        if self.file.is_file() and rewound.encode() != self.file.read_bytes():
            write_text(self.file, rewound)
        self.num_skipped = _skipped(row for row in kept if row["stage"] == self.stage)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _skipped(rows: Iterable[Mapping[str, Any]]) -> int:
    return sum(int(row.get("skipped", 0)) for row in rows)
