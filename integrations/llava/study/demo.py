"""The demo, a study on the embedded data: its table of contents."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from integrations.llava.checkpoints import load_model
from integrations.llava.config import STAGES, Recipe
from integrations.llava.data import read_image, read_samples
from integrations.llava.evaluation import blind_answers, read_questions, score_answers, summarise
from integrations.llava.inference import load_predictor
from integrations.llava.synthetic import made_from, make_dataset
from layerfuse.files import write_text

from .fingerprint import code_digest, finished, mark_finished
from .grid import REPORT_FILE, RESULTS_FILE, DemoSettings, check_settings, run_recipe
from .origin import describe_origin, describe_redrawing, describe_sizes
from .probes import Models, Readings, all_layers_backbone, probe_text
from .report import draw_examples, draw_layers, draw_points, draw_readings, draw_shares, render_report, thumbnail
from .results import DemoResults, Figure, FuserRun, PhotoAnswer
from .runs import finish_run, read_run

__all__ = ["run_demo"]

_LOG = logging.getLogger(__name__)
_NUM_ENLARGED = 2
_CELLS = 32


def run_demo(settings: DemoSettings, *, command: str | None = None) -> tuple[DemoResults, Path]:
    """Train every fuser with every seed, evaluate and probe, and write the report.

    Args:
        settings: of the study.
        command: noted in the report as the way to get the same numbers; this call if None.

    Returns:
        The results, and the path of ``report.html``.

    Raises:
        UserError: as `check_settings`, before anything is trained; or if there is nothing to redraw.
    """
    check_settings(settings)
    rows_file, report = settings.output / RESULTS_FILE, settings.output / REPORT_FILE
    command = command or f"run_demo({settings})"
    origin = describe_redrawing(rows_file) if settings.redraw else describe_origin(command)
    finish = read_run if settings.redraw else finish_run
    if settings.redraw:
        settings = _as_made(settings)
    seconds: dict[str, float] = {}
    with _timed("making data", seconds):
        data = settings.output / "data" if settings.redraw else _make_data(settings)
    recipes = {(f, seed): run_recipe(settings, f, seed, data) for f in settings.fusers for seed in settings.seeds}
    runs = []
    for number, ((fuser, seed), recipe) in enumerate(recipes.items(), start=1):
        _LOG.info("run %d of %d: %s, seed %d", number, len(recipes), fuser, seed)
        runs.append(finish(recipe, settings.output / "runs" / f"{fuser}-seed{seed}", data))
    firsts = runs[:: len(settings.seeds)]
    models = {run.fuser: load_model(run.folder) for run in firsts}
    recipe = recipes[settings.fusers[0], settings.seeds[0]]
    examples = draw_examples(firsts, data / "images", count=settings.num_examples)
    with _timed("probing layers", seconds):
        probes, readings = probe_text(
            all_layers_backbone(recipe.model),
            models,
            seed=settings.data_seed,
            num_train=settings.num_probe_images,
            num_test=max(1, settings.num_probe_images // 3),
        )
    with _timed("drawing feature maps", seconds):
        figures = _draw_maps(recipe, models, readings)
    results = DemoResults(
        runs=runs,
        chance=_chance(data),
        probes=probes,
        figures=figures,
        examples=examples,
        facts=describe_sizes(settings, recipe, runs[0], models[settings.fusers[0]]),
        origin=origin,
        seconds={part: taken for part, taken in seconds.items() if taken >= 0.05},
        photo=_answer_photo(settings, runs),
    )
    if not settings.redraw:
        write_text(rows_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results.rows()))
    write_text(report, render_report(results))
    return results, report


def _draw_maps(recipe: Recipe, models: Models, readings: Readings) -> list[Figure]:
    scenes = readings.scenes
    figures = [draw_readings(readings), *draw_shares(models, scenes), *draw_points(models, scenes[0])]
    # A backbone that was trained is none that can be built anew for larger pictures.
    if all("backbone" not in recipe.stage(stage).trainable for stage in STAGES):
        enlarged = all_layers_backbone(recipe.model, num_cells=_CELLS)
        figures += draw_layers(models, enlarged, scenes[:_NUM_ENLARGED])
    return figures


def _as_made(settings: DemoSettings) -> DemoSettings:
    """Return the settings with the seed and the numbers of images that the study's data were made from."""
    made = made_from(settings.output / "data")
    return replace(settings, data_seed=made["seed"], num_train=made["num_train"], num_test=made["num_test"])


def _make_data(settings: DemoSettings) -> Path:
    folder = settings.output / "data"
    # `make_dataset` compares the settings; here it is noted whether the code that draws has changed.
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


@contextmanager
def _timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    _LOG.info("%s …", part)
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started


def _chance(data: Path) -> dict[str, float]:
    """Accuracy per kind of one who knows the training answers but sees no image."""
    questions = read_questions(data / "test.jsonl")
    turns = []
    for sample in read_samples(data / "train.json"):
        texts = [turn["value"].replace("<image>", "").strip() for turn in sample["conversations"]]
        turns += list(zip(texts[0::2], texts[1::2], strict=True))
    answers = score_answers(questions, blind_answers(questions, turns))
    return {kind: scores.accuracy for kind, scores in summarise(answers).items()}


def _answer_photo(settings: DemoSettings, runs: list[FuserRun]) -> PhotoAnswer | None:
    if settings.image is None or settings.prompt is None:
        return None
    image, prompt = read_image(settings.image), settings.prompt
    answers = {f"{run.fuser}, seed {run.seed}": load_predictor(run.folder)([image], [prompt])[0] for run in runs}
    return PhotoAnswer(settings.image.name, thumbnail(image), prompt, answers)
