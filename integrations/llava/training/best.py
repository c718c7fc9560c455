"""The trained weights of a stage's best evaluation, on disk until the stage is finished.

A run that goes on from a checkpoint may need the weights that were best then. So those stay, too, as long as the
checkpoint does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from layerfuse.errors import MissingFileError
from layerfuse.files import atomic_folder, check_disk_space, read_safetensors

from .distributed import on_main
from .resume import checkpoints, state_bytes, trained_state

__all__ = ["BestWeights"]


class BestWeights:
    """Files of weights below a stage's folder, `best/step-<step>.safetensors`."""

    def __init__(self, stage_folder: Path, *, is_main_process: bool) -> None:
        self.stage_folder, self.folder = stage_folder, stage_folder / "best"
        self.is_main_process = is_main_process

    def file(self, step: int) -> Path:
        """Where the weights after a step are, or would be."""
        return self.folder / f"step-{step}.safetensors"

    def keep(self, model: nn.Module, step: int, *, needed: Callable[[Sequence[int]], set[int]]) -> None:
        """Write the weights after a step, whole or not at all; every process has to call this.

        Args:
            model: as the engine has it.
            step: that was just made.
            needed: tells of the steps of checkpoints whose weights a run would need that goes on from them.

        Raises:
            OSError: if the disk has no room; the weights that were best before are there.
        """
        state = trained_state(model, keep=self.is_main_process)
        on_main(lambda: self._write(state, step, needed))

    def _write(self, state: dict[str, torch.Tensor], step: int, needed: Callable[[Sequence[int]], set[int]]) -> None:
        check_disk_space(self.stage_folder, sum(value.nbytes for value in state.values()), "the best weights")
        with atomic_folder(self.folder) as scratch:
            save_file(state, scratch / self.file(step).name)
        steps = [int(path.name.rpartition("-")[2]) for path in checkpoints(self.stage_folder)]
        kept = {self.file(own).name for own in {step, *needed(steps)}}
        for path in self.folder.glob("step-*.safetensors"):
            if path.name not in kept:
                path.unlink()

    def check(self, step: int) -> None:
        """Raise FileNotFoundError if the weights after a step are not there."""
        if not self.file(step).is_file():
            raise MissingFileError(
                f"the weights of the best evaluation, that of step {step}, are gone: {self.file(step)}. Bring the file "
                f"back, or train the stage anew (--overwrite)."
            )

    def read(self, step: int) -> dict[str, torch.Tensor]:
        """Trained weights after a step, on the CPU; errors as of `read_safetensors`."""
        return read_safetensors(self.file(step))[0]

    @staticmethod
    def bytes_needed(model: nn.Module, keep_checkpoints: int) -> int:
        """Room for the best weights, those of every checkpoint, and new ones before old ones go."""
        return state_bytes(model) // 3 * (keep_checkpoints + 2)
