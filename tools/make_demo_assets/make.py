"""`make assets`: make the embedded backbone and language model again, from their recipes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import CLIPVisionModel

from integrations.llava.checkpoints.tensors import read_json
from layerfuse.errors import ExistingFileError, InputError
from layerfuse.files import atomic_folder, write_text

from .backbone import BackboneRecipe, pretrain_backbone, to_pixels
from .language_model import LanguageModelRecipe, pretrain_language_model
from .lookup import answer_accuracy
from .probing import probe_layers

__all__ = ["ASSETS", "AssetsRecipe", "make_assets"]

_LOG = logging.getLogger(__name__)

ASSETS = ("backbone", "llm")


@dataclass(frozen=True)
class AssetsRecipe:
    """Both recipes; the defaults made the weights in this folder.

    Attributes:
        backbone: of the tiny vision transformer.
        llm: of the tiny language model.
    """

    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    llm: LanguageModelRecipe = field(default_factory=LanguageModelRecipe)


def make_assets(
    folder: str | Path,
    *,
    parts: Sequence[str] = ASSETS,
    recipe: AssetsRecipe | None = None,
) -> Path:
    """Pretrain the embedded models and measure them.

    Args:
        folder: receives `backbone/`, `llm/` and, for each, `<part>.json`: recipe, seconds and measured numbers.
        parts: which of `ASSETS` to make.
        recipe: how; None takes the recipes that made the weights in this folder.

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
    makers: Mapping[str, tuple[Callable[[Path], None], object]] = {
        "backbone": (lambda path: pretrain_backbone(path, recipe.backbone), recipe.backbone),
        "llm": (lambda path: pretrain_language_model(path, recipe.llm), recipe.llm),
    }
    _refuse_foreign(folder, parts)
    for part in parts:
        make, settings = makers[part]
        start = time.perf_counter()
        with atomic_folder(folder / part) as scratch:
            make(scratch)
        seconds = round(time.perf_counter() - start)
        measured = _measure(part, folder / part)
        report = {"recipe": asdict(settings), "seconds": seconds, "measured": measured}  # type: ignore[call-overload]
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
    """Return what the README says about a part: probes by layer, or answers right by kind."""
    if part == "llm":
        return {kind: round(share, 3) for kind, share in answer_accuracy(folder).items()}
    model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()

    def encode(images: torch.Tensor) -> list[torch.Tensor]:
        return [states[:, 1:] for states in model(to_pixels(images), output_hidden_states=True).hidden_states]

    return [{name: round(value, 3) for name, value in layer.items()} for layer in probe_layers(encode)]
