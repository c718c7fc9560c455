"""The grid of a study: fusers and seeds, what all runs share, and the checks made before anything takes time."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from integrations.llava.config import Recipe, load_recipe
from integrations.llava.data import read_image
from layerfuse.errors import FileAccessError, InputError
from layerfuse.fusers import FUSERS

from .fingerprint import refuse_foreign

__all__ = ["REPORT_FILE", "RESULTS_FILE", "DemoSettings", "check_settings", "run_recipe"]

REPORT_FILE, RESULTS_FILE = "report.html", "results.jsonl"
"""Files at the top of a study's folder."""


@dataclass(frozen=True)
class DemoSettings:
    """Settings of a study; the defaults are the demo's.

    Attributes:
        fusers: names, in the order of the table.
        seeds: one run per fuser and seed.
        output: folder for data, runs and report.
        recipe: name or file of the recipe that all runs share but for fuser, seed and data.
        pretrain_steps: optimizer steps of the first stage; the recipe's own if None.
        finetune_steps: of the second stage.
        batch_size: samples a step in both stages; the recipe's own if None.
        num_train: training images.
        num_test: test images, each with one question of every kind.
        data_seed: of the images and questions.
        num_examples: test images that the report shows.
        num_probe_images: images that the probes are fitted on; a third as many test images score them.
        feature_cache: folder of the frozen backbone's maps, which all runs share; none if None. Recipes that name one
            themselves may leave it out.
        image: a photograph of the user's.
        prompt: a question about it.
        redraw: draw the report of a finished study anew, whatever code trained it; nothing is trained or answered.
    """

    fusers: tuple[str, ...] = ("select", "mmfuser")
    seeds: tuple[int, ...] = (0,)
    output: Path = Path("runs/demo")
    recipe: str = "tiny"
    pretrain_steps: int | None = None
    finetune_steps: int | None = None
    batch_size: int | None = None
    num_train: int = 2000
    num_test: int = 100
    data_seed: int = 0
    num_examples: int = 6
    num_probe_images: int = 1500
    feature_cache: Path | None = None
    image: Path | None = None
    prompt: str | None = None
    redraw: bool = False


def check_settings(settings: DemoSettings) -> None:
    """Find every mistake that would otherwise end a study after minutes of training.

    Raises:
        UserError: for a value that is unknown, given twice or too small, and a file that cannot be read or written.
    """
    if not settings.fusers or not settings.seeds:
        raise InputError(f"a demo needs a fuser and a seed; got fusers {settings.fusers} and seeds {settings.seeds}.")
    for name in settings.fusers:
        FUSERS.get(name)
    for what, given in (("fuser", settings.fusers), ("seed", settings.seeds)):
        twice = [str(entry) for entry in dict.fromkeys(given) if list(given).count(entry) > 1]
        if twice:
            raise InputError(f"{what} {', '.join(twice)} is given more than once; name each {what} once.")
    if min(settings.seeds) < 0:
        raise InputError(f"seed {min(settings.seeds)} is negative; seeds are 0 or above.")
    for what in ("pretrain_steps", "finetune_steps", "batch_size", "num_train", "num_test", "num_probe_images"):
        number = getattr(settings, what)
        if number is not None and number < 1:
            raise InputError(f"{what} is {number}; it has to be at least 1.")
    if (count := len(load_recipe(settings.recipe).model.backbones)) > 1:
        raise InputError(
            f"recipe {settings.recipe} names {count} backbones, and a demo probes the layers of one; name one backbone "
            "in the recipe, or train and evaluate it by the commands of their own."
        )
    # Refuses what does not go with the rest of the recipe.
    run_recipe(settings, settings.fusers[0], settings.seeds[0], settings.output)
    _check_photo(settings)
    refuse_foreign(settings.output, (REPORT_FILE, RESULTS_FILE))
    _check_folder("output", settings.output)
    if settings.feature_cache is not None:
        _check_folder("feature-cache", settings.feature_cache)


def _check_photo(settings: DemoSettings) -> None:
    if settings.image is None and settings.prompt:
        raise InputError("a prompt came without an image; also name a picture: --image photo.jpg (IMAGE=photo.jpg).")
    if settings.image is None:
        return
    if not (settings.prompt or "").strip():
        raise InputError(
            f"image {settings.image} came without a prompt; also ask something: --prompt 'How many …?' (PROMPT='…')."
        )
    read_image(settings.image)


def _check_folder(what: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise FileAccessError(
            f"{what} {folder} is a file, or lies inside one; give a folder: --{what} FOLDER."
        ) from error
    except OSError as error:
        raise FileAccessError(
            f"{what} folder {folder} cannot be written to ({error.strerror}); choose another: --{what} FOLDER."
        ) from error


def run_recipe(settings: DemoSettings, fuser: str, seed: int, data: Path) -> Recipe:
    """Make the recipe of a run: the study's with this fuser, this seed in both stages, and the data of this folder.

    ``select`` taps the last of the recipe's layers alone, as LLaVA-1.5 does.
    """
    layers = load_recipe(settings.recipe).model.layers
    # Another fuser than the recipe's takes its own default options.
    tapped = layers[-1:] if layers and fuser == "select" else layers
    values: dict[str, object] = {"model.fuser": fuser, "model.layers": tapped}
    stages = {
        "pretrain": ("pretrain.json", settings.pretrain_steps),
        "finetune": ("train.json", settings.finetune_steps),
    }
    for stage, (file, steps) in stages.items():
        values |= {f"{stage}.seed": seed, f"{stage}.max_steps": steps, f"{stage}.batch_size": settings.batch_size}
        values |= {f"{stage}.data.path": str(data / file), f"{stage}.data.image_folder": str(data / "images")}
        # Each layer is a map of its own there, so that one folder serves fusers that tap others.
        values[f"{stage}.feature_cache"] = None if settings.feature_cache is None else str(settings.feature_cache)
    return load_recipe(settings.recipe, {key: value for key, value in values.items() if value is not None})
