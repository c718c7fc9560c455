"""`make assets`: make the embedded backbone and language model again, from their recipes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from integrations.llava.checkpoints.tensors import read_json
from integrations.llava.study.probes import probe_text
from layerfuse.backbones import create_backbone
from layerfuse.errors import ExistingFileError, InputError
from layerfuse.files import atomic_folder, write_text

from .backbone import BackboneRecipe, pretrain_backbone
from .language_model import LanguageModelRecipe, pretrain_language_model
from .lookup import answer_accuracy

__all__ = ["ASSETS", "AssetsRecipe", "make_assets"]

_LOG = logging.getLogger(__name__)

ASSETS = ("backbone", "llm")


@dataclass(frozen=True)
class AssetsRecipe:
    """Recipes of both models; the defaults made the weights that are shipped."""

    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    llm: LanguageModelRecipe = field(default_factory=LanguageModelRecipe)


def make_assets(folder: str | Path, *, parts: Sequence[str] = ASSETS, recipe: AssetsRecipe | None = None) -> Path:
    """Pretrain the embedded models and measure them.

    Args:
        folder: receives `backbone/`, `llm/` and, for each, `<part>.json`: recipe, seconds and measured numbers.
        parts: which of `ASSETS` to make.
        recipe: how; None takes the one that made the weights that are shipped.

    Returns:
        The folder.

    Raises:
        ValueError: if a part is not one of `ASSETS`.
        FileExistsError: if the folder holds a part that this function did not make; said before anything is trained.
    """
    unknown = [part for part in parts if part not in ASSETS]
    if unknown:
        raise InputError(f"assets have no part {', '.join(unknown)}; known: {', '.join(ASSETS)}")
    recipe = recipe or AssetsRecipe()
    folder = Path(folder)
    _refuse_foreign(folder, parts)
    for part in parts:
        start = time.perf_counter()
        with atomic_folder(folder / part) as scratch:
            if part == "llm":
                pretrain_language_model(scratch, recipe.llm)
            else:
                pretrain_backbone(scratch, recipe.backbone)
        seconds = round(time.perf_counter() - start)
        measured = _measure(part, folder / part)
        report = {"recipe": asdict(recipe)[part], "seconds": seconds, "measured": measured}
        write_text(folder / f"{part}.json", json.dumps(report, indent=1) + "\n")
        _LOG.info("%s: made in %d s; %s", part, seconds, measured)
    return folder


def _refuse_foreign(folder: Path, parts: Sequence[str]) -> None:
    """Make sure that no model is replaced which was not made here: beside one that was lies its report."""
    for part in parts:
        report = folder / f"{part}.json"
        ours = report.is_file() and {"recipe", "seconds", "measured"} <= set(read_json(report))
        if not ours and (report.exists() or (folder / part).exists()):
            raise ExistingFileError(
                f"{folder} holds a {part!r} that was not made by `assets`, so it is left alone; give another folder."
            )


def _measure(part: str, folder: Path) -> object:
    """Return what the README says about a part: by layer, what the report's probes read; or answers right by kind."""
    if part == "llm":
        return {kind: round(share, 3) for kind, share in answer_accuracy(folder).items()}
    backbone = create_backbone(f"transformers:{folder}", layers=lambda depth: range(depth + 1)).float().eval()
    probes = probe_text(backbone, {}, seed=3000, num_train=1200, num_test=400)
    named = list(zip(("character", "shape", "color"), probes, strict=True))
    return [{name: round(probe.layers[layer], 3) for name, probe in named} for layer in backbone.layers]
