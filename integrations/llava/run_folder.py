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

from .atomic import write_text
from .checkpointing import latest_checkpoint
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
    "micro_batch_size",
    "gradient_checkpointing",
    "engine",
    "save_every",
    "keep_checkpoints",
    "num_workers",
    "log_every",
    "cache_images",
    "check_images",
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
        return latest_checkpoint(self.path / stage)

    @property
    def finished(self) -> tuple[str, ...]:
        """Stages that are finished, in order."""
        file = self.path / "run.json"
        return tuple(json.loads(file.read_text(encoding="utf-8"))["finished"]) if file.is_file() else ()

    def finish(self, stage: str) -> None:
        """Note that a stage is finished, and remove its checkpoints."""
        done = [name for name in STAGES if name in {*self.finished, stage}]
        write_text(self.path / "run.json", json.dumps({"finished": done}) + "\n")
        for checkpoint in (self.path / stage).glob("checkpoint-*"):
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
            raise ValueError(
                f"{self.path} already holds a run of another recipe, which differs in {'; '.join(differences)}. Give "
                "another folder, or replace the earlier run (--overwrite)."
            )
        left = tuple(stage for stage in stages if stage not in self.finished)
        if not left:
            raise ValueError(
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
        file = self.path / "parameters.json"
        noted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_text(file, json.dumps(noted | {stage: counts}, indent=2) + "\n")

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
