"""`make assets`: make the embedded backbone and language model again, from their recipes, and measure both."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from integrations.llava.checkpoints.tensors import read_json
from integrations.llava.evaluation.metrics.boxes import intersection_over_union, parse_box
from integrations.llava.study.probes import probe_text
from integrations.llava.synthetic.questions import KINDS, SceneQuestion, questions_of_kind
from integrations.llava.synthetic.scene import sample_scene
from layerfuse.backbones import create_backbone
from layerfuse.errors import ExistingFileError, InputError
from layerfuse.files import atomic_folder, write_text

from .backbone import BackboneRecipe, pretrain_backbone
from .language_model import LanguageModelRecipe, pretrain_language_model
from .writing import SceneWriter, embed_written

__all__ = ["ASSETS", "AssetsRecipe", "answer_accuracy", "is_right", "make_assets"]

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
    """Make sure that no model is replaced that was made elsewhere: one made here has its report beside it."""
    for part in parts:
        report = folder / f"{part}.json"
        ours = report.is_file() and {"recipe", "seconds", "measured"} <= set(read_json(report))
        if not ours and (report.exists() or (folder / part).exists()):
            raise ExistingFileError(
                f"{folder} holds a {part!r} that was not made by `assets`, so it is left alone; give another folder."
            )


def _measure(part: str, folder: Path) -> object:
    """Measure a part for its README: accuracies of the report's probes by layer, or shares of right answers by kind."""
    if part == "llm":
        return {kind: round(share, 3) for kind, share in answer_accuracy(folder).items()}
    backbone = create_backbone(f"transformers:{folder}", layers=lambda depth: range(depth + 1)).float().eval()
    probes, _ = probe_text(backbone, {}, seed=3000, num_train=1200, num_test=400)
    named = list(zip(("character", "shape", "color"), probes, strict=True))
    return [{name: round(probe.layers[layer], 3) for name, probe in named} for layer in backbone.layers]


def answer_accuracy(folder: str | Path, *, num_scenes: int = 100, seed: int = 4000) -> dict[str, float]:
    """Ask a language model one question of each kind about scenes of the test split; return kind -> share right."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    writer = SceneWriter(tokenizer)
    cells = torch.tensor(sorted(writer.cell_ids.values()))
    right: dict[str, list[bool]] = defaultdict(list)
    for index in range(num_scenes):
        rng = np.random.default_rng([seed, index])
        scene = sample_scene(rng, "test")
        for kind in KINDS:
            questions = questions_of_kind(scene, kind)
            if not questions:
                continue
            question = questions[int(rng.integers(len(questions)))]
            ids = torch.tensor([writer.prompt(scene, question.text)])
            with torch.no_grad():
                embeddings = embed_written(model, ids, cells)
            written = model.generate(
                inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False
            )
            (answer,) = tokenizer.batch_decode(written, skip_special_tokens=True)
            right[kind].append(is_right(answer, question))
    return {kind: float(np.mean(right[kind])) for kind in KINDS}


def is_right(answer: str, question: SceneQuestion) -> bool:
    """Score one answer: exact for words, intersection over union > 0.5 for boxes."""
    if question.box is None:
        return answer.strip() == question.answer
    box = parse_box(answer)
    return box is not None and intersection_over_union(box, question.box) > 0.5
