"""One recipe for each kind of model there is, by name, and what is asked of it once it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from integrations.llava.config import Recipe, load_recipe
from integrations.llava.inference.predictor import Predictor
from tests.integrations.llava.tiny_parts import tiny_overrides

__all__ = ["DINO", "MODELS", "SIGLIP", "SIZES", "VIT", "TrainedModels", "answers", "model_recipe"]

# Height and width of the eight images: single tiles, wide, tall and large ones; the last is a line.
SIZES = ((24, 30), (40, 100), (100, 40), (64, 64), (30, 120), (33, 31), (90, 20), (4, 200))

DINO, SIGLIP = "vit_small_patch14_reg4_dinov2.lvd142m", "vit_base_patch16_siglip_224.webli"
VIT: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}

_HEADS = {"mmfuser": 4, "cross_attention": 4, "attention_pool": 2, "depth_attention": 2, "spatial_aggregator": 2}
_ALONE: dict[str, dict[str, Any]] = {
    name: {"fuser": name, "fuser_options": {"num_heads": _HEADS[name]} if name in _HEADS else {}}
    for name in (
        *("select", "average", "scalar_mix", "concat", "mmfuser", "dense_connector", "depth_attention"),
        *("cross_attention", "attention_pool", "spatial_aggregator", "text_gated", "token_concat"),
    )
}
_ALONE["text_gated"]["fuser_options"] = {"groups": 2}
# Layer -1 is the fifth, which no fuser here reads.
_INJECTION: dict[str, Any] = {"injection.pairs": [[1, 0], [-1, 1]], "injection.when": "before"}
# A quarter of the tokens, as the pooling fuser gives them.
_SHUFFLED = _INJECTION | {"injection.merger": "pixel_shuffle_mlp", "injection.merger_options": {"window": 2}}
# OpenVLA's two, and two of several grids and of one width, for a fuser that takes such; "" is the tiny CLIP.
_TWO: dict[str, Any] = {
    "family": "timm",
    "backbone": [DINO, SIGLIP],
    "layers": [[1, -2], [3]],
    "image_size": [32, 48],
    "backbone_pretrained": False,
    "backbone_options": [VIT, {**VIT, "embed_dim": 48}],
}
_TWO_GRIDS = _TWO | {
    "family": ["transformers", "timm"],
    "backbone": ["", SIGLIP],
    "image_size": [None, 48],
    "backbone_options": [{}, VIT],
    "resample": "none",
}
_ANYRES: dict[str, Any] = {"image_layout": "anyres"}

MODELS: dict[str, dict[str, Any]] = {
    **_ALONE,
    "injection-concat": _ALONE["concat"] | _INJECTION,
    "injection-mmfuser": _ALONE["mmfuser"] | _INJECTION,
    "injection-attention_pool": _ALONE["attention_pool"] | _SHUFFLED,
    "anyres-concat": _ALONE["concat"] | _ANYRES,
    "anyres-mmfuser": _ALONE["mmfuser"] | _ANYRES,
    "two_backbones-concat": _ALONE["concat"] | _TWO,
    "two_backbones-mmfuser": _ALONE["mmfuser"] | _TWO_GRIDS,
    # Added before a layer: what is added after the last one reaches no text behind the image.
    "two_backbones-injection": _ALONE["concat"] | _TWO | _INJECTION | {"injection.pairs": [[[1, 1], 0], [2, 1]]},
    "anyres-injection": _ALONE["concat"] | _INJECTION | _ANYRES,
    "anyres-text_gated": _ALONE["text_gated"] | _ANYRES,
}


def model_recipe(name: str, backbone: Path, llm: Path, data: Path) -> Recipe:
    """The recipe of a model: both stages, as few steps as move every weight, in single precision."""
    overrides = tiny_overrides(backbone, llm, data) | {"model.layers": [1, 2, 3, 4]}
    overrides |= {f"model.{option}": value for option, value in MODELS[name].items()}
    if isinstance(named := overrides["model.backbone"], list):
        overrides["model.backbone"] = [each or str(backbone) for each in named]
    for stage, steps in (("pretrain", 1), ("finetune", 2)):
        overrides |= {f"{stage}.max_steps": steps, f"{stage}.learning_rate": 1e-2, f"{stage}.warmup_ratio": 0.0}
    return load_recipe("mmfuser_7b", overrides | {"pretrain.gradient_checkpointing": False})


class TrainedModels:
    """Folders of trained models, by the names of `MODELS`: each trained once, when it is first asked for.

    Nobody writes to them.
    """

    def __init__(self, recipe_of: Callable[[str], Recipe], folder: Path) -> None:
        self._recipe_of, self._folder = recipe_of, folder
        self._trained: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        from integrations.llava.training.train import train

        if name not in self._trained:
            self._trained[name] = train(self._recipe_of(name), self._folder / name)
        return self._trained[name]


def answers(predictor: Predictor, folder: Path, batch_size: int) -> list[str]:
    """Answers to eight questions about one image, several, none, of all `SIZES`."""
    paths = [folder / f"{index}.png" for index in range(len(SIZES))]
    images = [*paths[:2], paths[3], *paths[5:7], None, [paths[4], paths[0]], [paths[7], paths[2], paths[1]]]
    prompts = ["What number is it?" + " Sure?" * (index % 3) for index in range(len(images))]
    return predictor(images, prompts, batch_size=batch_size, max_new_tokens=4)
