"""The demo as a table of contents: data, runs, chance level, probes, pictures, report."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from integrations.llava.checkpoints import load_model
from integrations.llava.config import Recipe
from integrations.llava.data import read_samples
from integrations.llava.evaluation import blind_answers, read_image, read_questions, score_answers, summarise
from integrations.llava.inference import load_predictor
from integrations.llava.synthetic import make_dataset
from layerfuse import __version__
from layerfuse.files import write_text

from .fingerprint import code_digest, finished, mark_finished
from .probing import all_layers_backbone, probe_text
from .report.document import write_report
from .report.pictures import draw_examples, draw_feature_maps, thumbnail
from .results import DemoResults, FuserRun, PhotoAnswer
from .runs import finish_run, run_folder
from .settings import REPORT_FILE, RESULTS_FILE, DemoSettings, check_settings, run_recipe

__all__ = ["run_demo"]

_LOG = logging.getLogger(__name__)
_NUM_FIGURES = 4


def run_demo(settings: DemoSettings, *, command: str | None = None) -> tuple[DemoResults, Path]:
    """Train, compare and report.

    Args:
        settings: what to run.
        command: noted in the report as the way to get the same; this call if None.

    Returns:
        The results, and the path of ``report.html``.

    Raises:
        UserError: for settings that cannot work, before
            anything is trained; see `check_settings`.
    """
    check_settings(settings)
    clock = _Clock()
    with clock.part("making data"):
        data = _make_data(settings)
    recipes = {(f, seed): run_recipe(settings, f, seed, data) for f in settings.fusers for seed in settings.seeds}
    runs = []
    for number, ((fuser, seed), recipe) in enumerate(recipes.items(), start=1):
        _LOG.info("run %d of %d: %s, seed %d", number, len(recipes), fuser, seed)
        runs.append(finish_run(recipe, run_folder(settings.output, fuser, seed), data))
    firsts = {run.fuser: run for run in reversed(runs)}
    firsts = {fuser: firsts[fuser] for fuser in settings.fusers}
    models = {fuser: load_model(run.folder) for fuser, run in firsts.items()}
    recipe = recipes[settings.fusers[0], settings.seeds[0]]
    examples = draw_examples(list(firsts.values()), data / "images", count=settings.num_examples)
    with clock.part("probing layers"):
        probes = probe_text(
            all_layers_backbone(recipe.model),
            models,
            seed=settings.data_seed,
            num_train=settings.num_probe_images,
            num_test=max(1, settings.num_probe_images // 3),
        )
    with clock.part("drawing feature maps"):
        names = [example.name for example in examples[:_NUM_FIGURES]]
        figures = draw_feature_maps(models, names, data / "images")
    results = DemoResults(
        runs=runs,
        chance=_chance(data),
        probes=probes,
        figures=figures,
        examples=examples,
        facts=_facts(settings, recipe, runs[0], models[settings.fusers[0]]),
        origin=_origin(command or f"run_demo({settings})"),
        seconds={part: seconds for part, seconds in clock.seconds.items() if seconds >= 0.05},
        photo=_answer_photo(settings, runs),
    )
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results.rows())
    write_text(settings.output / RESULTS_FILE, rows)
    return results, write_report(results, settings.output / REPORT_FILE)


def _make_data(settings: DemoSettings) -> Path:
    folder = settings.output / "data"
    # The data set knows its own settings; whether the code that draws it has changed is noted here.
    fingerprint = code_digest("data")
    make_dataset(
        folder,
        seed=settings.data_seed,
        num_train=settings.num_train,
        num_val=1,
        num_test=settings.num_test,
        renew=finished(settings.output, "data", fingerprint) is None,
    )
    mark_finished(settings.output, "data", fingerprint, {})
    return folder


@dataclass
class _Clock:
    """Adds up how long the parts of the demo take, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        _LOG.info("%s …", name)
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def _chance(data: Path) -> dict[str, float]:
    """Accuracy per kind of one who knows the training answers but sees no image."""
    questions = read_questions(data / "test.jsonl")
    turns = []
    for sample in read_samples(data / "train.json"):
        texts = [turn["value"].replace("<image>", "").strip() for turn in sample["conversations"]]
        turns += list(zip(texts[0::2], texts[1::2], strict=True))
    scores = summarise(score_answers(questions, blind_answers(questions, turns)))
    return {kind: own.accuracy for kind, own in scores.items()}


def _answer_photo(settings: DemoSettings, runs: list[FuserRun]) -> PhotoAnswer | None:
    if settings.image is None or settings.prompt is None:
        return None
    image = read_image(settings.image)
    answers = {
        f"{run.fuser}, seed {run.seed}": load_predictor(run.folder)([image], [settings.prompt])[0] for run in runs
    }
    return PhotoAnswer(name=settings.image.name, image=thumbnail(image), prompt=settings.prompt, answers=answers)


def _facts(settings: DemoSettings, recipe: Recipe, run: FuserRun, model: torch.nn.Module) -> dict[str, str]:
    steps = [len(run.losses.get(stage, ())) for stage in ("pretrain", "finetune")]
    backbone = model.model.vision_tower.backbone  # type: ignore[union-attr]
    count = sum(parameter.numel() for parameter in model.parameters())
    questions = sum(scores.num_questions for scores in run.kinds.values())
    return {
        "training images": f"{settings.num_train:,}",
        "test images": f"{settings.num_test:,} ({questions:,} questions)",
        "steps": f"{steps[0]:,} pretrain + {steps[1]:,} finetune",
        "batch": f"{recipe.pretrain.batch_size} / {recipe.finetune.batch_size} images",
        "backbone": f"{backbone.num_blocks} blocks, width {backbone.embed_dim}, frozen",  # type: ignore[union-attr]
        "whole model": f"{count / 1e6:.1f} M parameters",
        "seeds": ", ".join(map(str, settings.seeds)),
    }


def _origin(command: str) -> Mapping[str, str]:
    return {
        "command": command,
        "commit": _commit(),
        "hardware": _hardware(),
        "versions": f"layerfuse {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """The commit that the code is at, marked if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none (not in a git checkout)"


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores ({_processor()}), {torch.get_num_threads()} torch threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
