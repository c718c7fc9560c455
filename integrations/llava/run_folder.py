"""The folder of a run: what is in it, what is finished, whether a start begins anew, goes on, or is refused.

recipe.yaml            every value resolved
run.json               the stages that are finished
parameters.json        trainable and frozen parameters, by stage and part
metrics.jsonl, logs/   loss of every step; TensorBoard
<stage>/adapter.safetensors      fuser and projector after the stage
<stage>/checkpoint-<step>/       while the stage runs
config.json, model*.safetensors, processor files    the model, once the last stage asked for is finished
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from layerfuse.errors import InputError
from layerfuse.files import write_text

from .checkpointing import checkpoints
from .config import STAGES, Recipe
from .recipe_files import dump_recipe

__all__ = ["RunFolder"]

# What a run writes, as far as it must not outlive it; `clear` removes these and nothing else.
_WRITTEN = (
    "config.json",
    "model*.safetensors*",
    "recipe.yaml",
    "run.json",
    "parameters.json",
    "metrics.jsonl",
    "logs",
    *STAGES,
)

# Values that may differ between two starts of one run: they change its speed and its habits, not its result.
_FREE = {
    "image_folder",
    "gradient_checkpointing",
    "engine",
    "save_every",
    "keep_checkpoints",
    "num_workers",
    "log_every",
    "cache_images",
}


class RunFolder:
    """A run's folder.

    Args:
        path: need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def adapter(self, stage: str) -> Path:
        """Name the file of fuser and projector after a stage."""
        return self.path / stage / "adapter.safetensors"

    def checkpoint(self, stage: str) -> Path | None:
        """Find the newest checkpoint of a stage, or None."""
        found = checkpoints(self.path / stage)
        return found[-1] if found else None

    @property
    def finished(self) -> tuple[str, ...]:
        """Stages that are finished, in order."""
        return tuple(self._noted("run.json").get("finished", ()))

    def finish(self, stage: str) -> None:
        """Note that a stage is finished, and remove its checkpoints."""
        done = [name for name in STAGES if name in {*self.finished, stage}]
        self._note("run.json", {"finished": done})
        for checkpoint in checkpoints(self.path / stage):
            shutil.rmtree(checkpoint)

    def open(self, recipe: Recipe, stages: Sequence[str]) -> tuple[str, ...]:
        """Look what is left to do.

        Args:
            recipe: what is to be trained.
            stages: the stages asked for.

        Returns:
            The stages asked for that are not finished.

        Raises:
            ValueError: if the folder holds a run of another recipe, or one in which these stages are finished.
        """
        file = self.path / "recipe.yaml"
        if not file.is_file():
            return tuple(stages)
        earlier, now = (yaml.safe_load(text) for text in (file.read_text(encoding="utf-8"), dump_recipe(recipe)))
        differences = list(_differences(earlier, now))
        if differences:
            raise InputError(
                f"{self.path} already holds a run of another recipe, which differs in {'; '.join(differences)}. Give "
                "another folder, or replace the earlier run (--overwrite)."
            )
        left = tuple(stage for stage in stages if stage not in self.finished)
        if not left:
            raise InputError(
                f"{self.path} already holds a finished run of this recipe ({', '.join(self.finished)}). Give another "
                "folder, or replace the earlier run (--overwrite)."
            )
        return left

    def begin(self, recipe: Recipe) -> None:
        """Write the recipe, unless an earlier start has."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "recipe.yaml").is_file():
            write_text(self.path / "recipe.yaml", dump_recipe(recipe))

    def note_parameters(self, stage: str, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Write a stage's numbers of trainable and frozen parameters beside the other stages'."""
        self._note("parameters.json", {stage: counts})

    def note_samples(self, stage: str, num_samples: int) -> None:
        """Write how many samples a stage trains on; an earlier start has to have had as many.

        Raises:
            ValueError: if it had another number: their order would be another one, too.
        """
        noted = self._noted("run.json").get("samples", {})
        if noted.get(stage, num_samples) != num_samples:
            raise InputError(
                f"stage {stage} of {self.path} began with {noted[stage]:,} usable samples, now there are "
                f"{num_samples:,}: the data have changed, or images cannot be reached. Bring them back, or replace the "
                "run (--overwrite)."
            )
        self._note("run.json", {"samples": noted | {stage: num_samples}})

    def _noted(self, name: str) -> dict[str, Any]:
        file = self.path / name
        noted: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return noted

    def _note(self, name: str, values: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(self._noted(name) | dict(values), indent=2) + "\n")

    def clear(self) -> None:
        """Remove what an earlier run wrote, its weights first of all: they would not belong to the new recipe."""
        for pattern in _WRITTEN:
            for path in self.path.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _differences(earlier: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        for name in sorted({*earlier, *now} - _FREE):
            yield from _differences(earlier.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif earlier != now:
        yield f"{key} ({earlier!r} then, {now!r} now)"
