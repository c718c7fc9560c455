"""The log of a run: one line per optimizer step, TensorBoard, a progress bar, and what was left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava._files import json_lines
from layerfuse.files import write_text

if TYPE_CHECKING:
    from .trainer import LlavaTrainer

__all__ = ["RunLog"]

_log = logging.getLogger(__name__)


class RunLog(TrainerCallback):
    """Writes every step's loss to a JSON lines file and to TensorBoard, and shows a progress bar in a terminal.

    A line holds `stage`, `step`, `loss` (over all processes), `learning_rate`, `grad_norm` (before clipping) and, where
    samples were left out, `skipped`. Lines are written when Trainer logs and before every checkpoint, so that a run
    which goes on from one continues the file without gap or repetition. Add it after all callbacks that may ask for a
    checkpoint.

    Args:
        trainer: whose steps are written.
        folder: gets `metrics.jsonl`, appended to, and TensorBoard files under `logs/<stage>`.
        stage: name of the stage, written into every line.
    """

    def __init__(self, trainer: LlavaTrainer, folder: Path, stage: str) -> None:
        self.trainer = trainer
        self.folder = folder
        self.stage = stage
        self.num_skipped = 0
        self.start = 0
        self.writer: SummaryWriter | None = None
        self.bar: tqdm[Any] | None = None

    @property
    def _file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar; files change when there is something to write, after the first step."""
        if state.is_world_process_zero:
            self.start = state.global_step
            self.bar = tqdm(total=state.max_steps, desc=self.stage, unit="step", disable=None, initial=self.start)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar, and write before a checkpoint is."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if control.should_save:
            self._write()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the steps since the last entry."""
        self._write()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write what is left, say what was left out, close bar and files."""
        self._write()
        if self.bar is not None:
            self.bar.close()
            if self.writer is not None:
                self.writer.close()
            if self.num_skipped:
                _log.warning("stage %s: %d samples were skipped", self.stage, self.num_skipped)

    def _write(self) -> None:
        """Write the steps that are not yet; every process has to call this."""
        rows = self.trainer.take_rows()
        if rows and self.bar is not None:
            if self.writer is None:
                # What an interrupted run logged after its last checkpoint is forgotten.
                self._rewind(self.start)
                self.writer = SummaryWriter(str(self.folder / "logs" / self.stage), purge_step=self.start + 1)
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(_line({"stage": self.stage} | row) for row in rows)
            for row in rows:
                for key in row.keys() - {"step"}:
                    self.writer.add_scalar(key, row[key], row["step"])
            self.writer.flush()
            self.num_skipped += _skipped(rows)
            self.bar.set_postfix(loss=f"{rows[-1]['loss']:.4f}", refresh=False)
        self.trainer.stop_if_gradients_broke()

    def _rewind(self, step: int) -> None:
        """Remove this stage's lines behind a step, and a last line that was cut off while it was written."""
        rows = [row for _, row in json_lines(self._file, growing=True)] if self._file.is_file() else []
        kept = [row for row in rows if row["stage"] != self.stage or row["step"] <= step]
        rewound = "".join(map(_line, kept))
        if self._file.is_file() and rewound.encode() != self._file.read_bytes():
            write_text(self._file, rewound)
        self.num_skipped = _skipped(row for row in kept if row["stage"] == self.stage)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _skipped(rows: Iterable[Mapping[str, Any]]) -> int:
    return sum(int(row.get("skipped", 0)) for row in rows)
