"""What is wrong with a start, gathered over recipe, folders and data of all stages, so that it is told in one go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from layerfuse.errors import InputError, MissingFileError, MissingPackageError, UserError

__all__ = ["Problems"]

_CLASSES = (MissingPackageError, MissingFileError, InputError)


class Problems:
    """Errors of a user's, in the order in which they were found, each with the stages that it is about."""

    def __init__(self) -> None:
        self._stages: dict[str, list[str]] = {}
        self._errors: dict[str, UserError] = {}

    @contextmanager
    def of(self, stage: str = "") -> Iterator[None]:
        """Keep an error of the block's; without a stage it is about all of them."""
        try:
            yield
        except UserError as error:
            self._errors.setdefault(str(error), error)
            self._stages.setdefault(str(error), []).append(stage)

    def about(self, stage: str) -> bool:
        """Whether an error of a stage was kept."""
        return any(stage in stages for stages in self._stages.values())

    def __str__(self) -> str:
        return "\n".join(f"  {where}{text}".replace("\n", "\n  ") for where, text in self._told())

    def __bool__(self) -> bool:
        """Whether an error was kept."""
        return bool(self._errors)

    def raise_any(self) -> None:
        """Raise what was kept: a single error of its own class, several as one InputError, sorted by stage."""
        if len(self._errors) > 1:
            count = len(self._errors)
            raise InputError(f"{count} problems, and no step was made; mend them, then start again:\n{self}")
        for (where, text), error in zip(self._told(), self._errors.values(), strict=True):
            kind = next((kind for kind in _CLASSES if isinstance(error, kind)), None)
            raise error if kind is None or not where else kind(f"{where}{text}") from error

    def _told(self) -> list[tuple[str, str]]:
        """Stages, in words, and text of each error; those that are about all come first, then stage by stage."""
        told = []
        for text, stages in self._stages.items():
            named = [stage for stage in dict.fromkeys(stages) if stage]
            words = f"stage{'s' * (len(named) > 1)} {' and '.join(named)}: " if named else ""
            told.append((words, text))
        order = list(dict.fromkeys(stage for stages in self._stages.values() for stage in stages))
        ranks = {text: order.index(stages[0]) if stages[0] else -1 for text, stages in self._stages.items()}
        return sorted(told, key=lambda entry: ranks[entry[1]])
