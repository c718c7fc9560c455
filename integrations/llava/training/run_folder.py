"""The folder of a run: its files, its finished stages, and whether a start begins anew, goes on, or is refused.

recipe.yaml            every value resolved
run.json               the stages that are finished, the samples each trains on, what each started from
parameters.json        trainable and frozen parameters, by stage and part
metrics.jsonl, logs/   loss of every step, evaluations; TensorBoard's files, if it is reported to
train.log              the same for people: speed, time left, memory
<stage>/adapter.safetensors      fuser and projector after the stage
<stage>/checkpoint-<step>/, <stage>/best/       while the stage runs
config.json, model*.safetensors, processor files    the model, once the last stage asked for is finished
.lock, .running.json   while a training works in it

A stage has begun when there is something of it to lose: a checkpoint, a finished stage, or logged steps. Until then
nothing binds the folder to a recipe.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from integrations.llava._files import json_lines
from integrations.llava.config import STAGES, Recipe, dump_recipe
from layerfuse.errors import FileAccessError, InputError
from layerfuse.files import write_text

from .resume import checkpoints

__all__ = ["RunFolder"]

# What a run leaves of its model and of a stage, as far as it must not outlive them; nothing else is ever removed.
_MODEL = ("config.json", "model*.safetensors*")
_STAGE = ("adapter.safetensors", "lora", "non_finite_loss.json", ".saving", "best")

# Values that may differ between two starts of one run: they change its speed and its habits, not its result.
_FREE = {
    "image_folder",
    "gradient_checkpointing",
    "compile",
    "feature_cache",
    "engine",
    "save_every",
    "keep_checkpoints",
    "num_workers",
    "log_every",
    "cache_images",
    "cross_entropy",
    "trial",
    "padding_free",
    # Where the model lies that the run goes on from; its digest tells what it is.
    "checkpoint",
    "checkpoint_base",
    "vision_tower",
}

# What run.json notes of each stage.
_NOTED = ("samples", "digests", "origins", "steps", "best")


class RunFolder:
    """A run's folder, which need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        # Whether this start has made a step, so that something of it is in the folder.
        self.claimed = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainings out of the folder while the block runs; where nothing was written, it stays as it was.

        The operating system gives the lock back when the process ends, however it ends.

        Raises:
            InputError: if a training works in the folder; its process and machine are named.
            OSError: if the folder cannot be written to.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        before = {path.name for path in self.path.glob("*")}  # hidden ones, too
        file, running = self.path / ".lock", self.path / ".running.json"
        lock = FileLock(file)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout as error:
            raise InputError(
                f"a training is running in {self.path}: {_holder(running)}. Wait for it, end it, or give another "
                "folder (--output)."
            ) from error
        except (OSError, NotImplementedError) as error:
            raise FileAccessError(
                f"the folder {self.path} cannot be written to, or its disk cannot lock files ({error}); give another "
                "one (--output)."
            ) from error
        try:
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            write_text(running, json.dumps(holder) + "\n")
            yield
        finally:
            running.unlink(missing_ok=True)
            # Trainer makes a stage's before anything is written.
            for folder in (self.path / stage for stage in STAGES):
                _remove_if_empty(folder)
            # Where a run has left something, the lock's file stays. Who opened it meanwhile finds that it is gone.
            with suppress(OSError):  # Windows keeps a file that is open
                if {path.name for path in self.path.iterdir()} - before == {file.name}:
                    file.unlink()
            lock.release()
            for folder in made:
                _remove_if_empty(folder)

    def holder(self) -> str | None:
        """Process and machine that train in the folder, or None."""
        running = self.path / ".running.json"
        if not running.is_file():
            return None
        # A start that was killed left the file behind, and its lock is free.
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return _holder(running)
        except (OSError, NotImplementedError):  # not ours to write: what the file says has to do
            return _holder(running)
        lock.release()
        return None

    def adapter(self, stage: str) -> Path:
        """File of fuser and projector after a stage."""
        return self.path / stage / "adapter.safetensors"

    def checkpoint(self, stage: str) -> Path | None:
        """The newest checkpoint of a stage, or None."""
        return next(reversed(checkpoints(self.path / stage)), None)

    @property
    def finished(self) -> tuple[str, ...]:
        """Stages that are finished, in order."""
        return tuple(self.noted("run.json").get("finished", ()))

    def logged_steps(self, stage: str) -> int:
        """Number of the last step of a stage that the log has; 0 if none."""
        return max((row.get("step", 0) for row in self.rows() if row.get("stage") == stage), default=0)

    def begun(self, stage: str) -> bool:
        """Whether there is something of a stage that could be lost."""
        return stage in self.finished or self.checkpoint(stage) is not None or self.logged_steps(stage) > 0

    def finish(self, stage: str, *, best: Mapping[str, float] | None = None) -> None:
        """Note that a stage is finished, and its best evaluation; remove its checkpoints and the best weights."""
        finished = [name for name in STAGES if name in {*self.finished, stage}]
        bests = {**self.noted("run.json").get("best", {}), **({} if best is None else {stage: best})}
        self._note("run.json", {"finished": finished, "ended": None, **({"best": bests} if bests else {})})
        for folder in (*checkpoints(self.path / stage), self.path / stage / "best"):
            shutil.rmtree(folder, ignore_errors=not folder.exists())

    def open(self, recipe: Recipe, stages: Sequence[str], *, overwrite: bool = False) -> tuple[str, ...]:
        """Stages asked for that are not finished, all of them with `overwrite`; nothing is changed.

        Raises:
            ValueError: if the folder holds stages of another recipe, if these stages are finished, or if a later one,
                which was not asked for, stands on what would be replaced.
        """
        begun = [stage for stage in STAGES if self.begun(stage)]
        left = tuple(stage for stage in stages if overwrite or stage not in self.finished)
        kept = [stage for stage in begun if not (overwrite and stage in stages)]
        self._check_checkpoint(recipe, kept)
        differences = list(self._differences(recipe, kept))
        if differences:
            raise InputError(
                f"{self.path} already holds a run of another recipe, which differs in {'; '.join(differences)}. Give "
                f"another folder (--output), or the recipe that began it: {self.recipe_file}."
            )
        if not left:
            raise InputError(
                f"{self.path} already holds a finished run of this recipe ({', '.join(self.finished)}). Give another "
                "folder (--output)."
            )
        later = [stage for stage in kept if STAGES.index(stage) > STAGES.index(left[0]) and stage not in left]
        if later:
            raise InputError(
                f"{self.path} holds {', '.join(later)}, which comes after {left[0]}: training {left[0]} there would "
                "leave it behind without what it belongs to. Give another folder (--output)."
            )
        return left

    def checkpoint_of_run(self) -> tuple[str, str] | None:
        """Folder and digest of the model that the folder's run goes on from, or None."""
        model = self._recipe().get("model", {})
        found = str(model.get("checkpoint", "")), str(model.get("checkpoint_digest", ""))
        return found if found[0] else None

    def _check_checkpoint(self, recipe: Recipe, kept: Sequence[str]) -> None:
        """Refuse another model than the one that the stages in `kept` began from."""
        earlier, now = self.checkpoint_of_run(), recipe.model
        if kept and (earlier or ("", ""))[1] != now.checkpoint_digest:
            words = [
                f"the model {place}, digest {digest}" if digest else "the parts that its recipe names"
                for place, digest in (earlier or ("", ""), (now.checkpoint, now.checkpoint_digest))
            ]
            raise InputError(
                f"{self.path} began from {words[0]}, and now it would go on from {words[1]}, which is not the same. "
                "Give the one it began from (--from), or another folder (--output)."
            )

    def _recipe(self) -> dict[str, Any]:
        if not self.recipe_file.is_file():
            return {}
        try:
            recipe: dict[str, Any] = yaml.safe_load(self.recipe_file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise InputError(f"{self.recipe_file} is damaged ({error}); give another folder (--output).") from error
        return recipe

    def _differences(self, recipe: Recipe, kept: Sequence[str]) -> Iterator[str]:
        """Differences from the recipe in the folder, in all that the stages in `kept` depend on."""
        earlier = self._recipe()
        if not kept or not earlier:
            return
        now, default = (yaml.safe_load(dump_recipe(each)) for each in (recipe, Recipe()))
        for section in ("name", "model", *kept):
            then, asked = (_binding(each.get(section)) for each in (earlier, now))
            yield from _differences(then, asked, default.get(section), section)

    def claim(
        self,
        recipe: Recipe,
        stage: str,
        *,
        samples: tuple[int, str],
        origin: str,
        parameters: Mapping[str, Mapping[str, int]],
        steps: int,
        replaces: Sequence[str] = (),
    ) -> None:
        """Make the folder this recipe's, when a stage has made its first step; nothing is written before.

        Noted are number and digest of its samples, `ConnectorOrigin.note`, the numbers of trainable and frozen
        parameters of each part, and that of its steps. Earlier results of the stages in `replaces` are removed.
        """
        self.claimed = True
        self._clear(replaces)
        write_text(self.recipe_file, dump_recipe(recipe))
        noted, news = self.noted("run.json"), {"samples": samples[0], "digests": samples[1], "origins": origin}
        news["steps"] = steps
        noted_by_stage = {key: noted.get(key, {}) | {stage: value} for key, value in news.items()}
        self._note("run.json", noted_by_stage | {"ended": None})
        self._note("parameters.json", {stage: parameters})

    def note_end(self, kind: str, reason: str) -> None:
        """Note why a start ended before its stages were finished, if it has made a step: "stopped" or "failed"."""
        if self.claimed:
            with suppress(OSError):  # a full disk is why it ended
                self._note("run.json", {"ended": {"kind": kind, "reason": reason, "at": time.strftime("%F %T")}})

    def origin(self, stage: str) -> str | None:
        """Origin of a stage's fuser and projector that `claim` noted, or None."""
        origin: str | None = self.noted("run.json").get("origins", {}).get(stage)
        return origin

    def check_samples(self, stage: str, number: int, digest: str) -> None:
        """Refuse other samples, or another number of them, for a stage that has begun."""
        if not self.begun(stage):
            return
        noted = self.noted("run.json")
        advice = "Bring them back, or give another folder (--output)."
        earlier = noted.get("samples", {}).get(stage, number)
        if earlier != number:
            raise InputError(
                f"stage {stage} of {self.path} began with {earlier:,} usable samples, now there are {number:,}: the "
                f"data have changed, or images cannot be reached. {advice}"
            )
        if noted.get("digests", {}).get(stage, digest) != digest:
            raise InputError(
                f"stage {stage} of {self.path} began with other samples: there are {number:,} as before, but their "
                f"text, images' names or order have changed. {advice}"
            )

    def bytes_replaced(self, stages: Sequence[str]) -> int:
        """Bytes that `claim` frees when it replaces stages."""
        paths = (file for path in self._written(stages) for file in (path, *path.rglob("*")))
        return sum(file.stat().st_size for file in paths if file.is_file())

    def _written(self, stages: Sequence[str]) -> Iterator[Path]:
        """Files and folders of stages, after those of the model that came of them."""
        for pattern in _MODEL if stages else ():
            yield from self.path.glob(pattern)
        for stage in stages:
            yield from (self.path / stage / name for name in _STAGE if (self.path / stage / name).exists())
            yield from checkpoints(self.path / stage)
            if (self.path / "logs" / stage).is_dir():
                yield self.path / "logs" / stage

    def _clear(self, stages: Sequence[str]) -> None:
        for path in list(self._written(stages)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        for stage in stages:
            _remove_if_empty(self.path / stage)  # it may hold something of the user's
        if stages and (self.path / "run.json").is_file():
            noted = self.noted("run.json")
            left = {
                key: {stage: value for stage, value in noted.get(key, {}).items() if stage not in stages}
                for key in _NOTED
                if key in noted
            }
            self._note("run.json", {"finished": [name for name in self.finished if name not in stages], **left})
        rows = list(self.rows())
        if any(row.get("stage") in stages for row in rows):
            kept = (json.dumps(row) + "\n" for row in rows if row.get("stage") not in stages)
            write_text(self.path / "metrics.jsonl", "".join(kept))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read the log; a line that a kill cut off is passed over."""
        file = self.path / "metrics.jsonl"
        return (row for _, row in json_lines(file, growing=True)) if file.is_file() else iter(())

    def noted(self, name: str = "run.json") -> dict[str, Any]:
        """Read what a file of the folder notes; nothing if it is not there, a ValueError if it is damaged."""
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            noted: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error}); give another folder (--output).") from error
        return noted

    def _note(self, name: str, values: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(self.noted(name) | dict(values), indent=2) + "\n")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _holder(file: Path) -> str:
    with suppress(OSError, ValueError, KeyError):
        holder = json.loads(file.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    return "another process, which has not said which"


def _binding(section: Any) -> Any:
    """A section of a recipe without evaluations on which nothing depends: they may be another run's."""
    validation = section.get("validation") if isinstance(section, dict) else None
    if validation is None or validation.get("keep_best") or validation.get("patience"):
        return section
    return {key: value for key, value in section.items() if key != "validation"}


def _differences(earlier: Any, now: Any, default: Any, key: str) -> Iterator[str]:
    """Compare; a key that the earlier recipe does not have, since it is older than the key, had the default."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        default = default if isinstance(default, dict) else {}
        for name in sorted({*earlier, *now} - _FREE):
            then, asked = (each.get(name, default.get(name)) for each in (earlier, now))
            yield from _differences(then, asked, default.get(name), f"{key}.{name}")
    elif _as_written(earlier) != now:
        yield f"{key} ({earlier!r} then, {now!r} now)"


def _as_written(value: Any) -> Any:
    """A value of a recipe as `dump_recipe` writes it; version 0.1 left paths from the working folder as they were."""
    begins = isinstance(value, str) and value.startswith(("./", "../"))
    return str(Path(value).resolve()) if begins else value
