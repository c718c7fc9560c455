"""Held-out samples of a stage: when it is measured on them, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from .limits import Checked, Count

__all__ = ["ValidationConfig"]


@dataclass(frozen=True)
class ValidationConfig(Checked):
    """Held-out samples on which a stage is measured while it trains, and what follows from the numbers.

    Attributes:
        path: held-out samples, in a form that `data.path` may have, or several; empty: none.
        image_folder: folder that their images' names are relative to; empty: that of the stage's own data.
        every: optimizer steps between two evaluations; None: a tenth of the stage's steps. The last step is evaluated
            in any case.
        at_start: evaluate before the first step, too.
        best_by: what the best evaluation is told by: "loss", the lowest, or the name of a score, the highest.
        keep_best: what the stage leaves is the weights of its best evaluation, not those of its last step.
        patience: evaluations in a row that are no better than the best one, after which the stage ends; None: it never
            does before its last step.
    """

    path: str | tuple[str, ...] = ""
    image_folder: str = ""
    every: Count | None = None
    at_start: bool = False
    best_by: str = "loss"
    keep_best: bool = False
    patience: Count | None = None

    @property
    def decides(self) -> bool:
        """Whether what a stage leaves depends on its evaluations."""
        return self.keep_best or self.patience is not None
