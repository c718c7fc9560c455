"""The fusers of the model table, and what is tried on each: one function a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from layerfuse import FusedEncoder
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import FUSERS, Fuser, FuserCost, create_fuser
from layerfuse.testing import random_features, random_images, randomise_parameters, tiny_backbone
from tools.model_table.backbone_columns import check_close, run_onnx
from tools.model_table.cells import YES, DifferenceError, TrialColumn

__all__ = ["CHANNELS", "FUSER_COLUMNS", "GRID", "NUM_LAYERS", "FuserTrial", "fuser_forms"]

GRID, NUM_LAYERS, CHANNELS = (24, 24), 5, 1024
_CONDITION = 4096
# Of the other trials; text_gated needs four maps at least.
_WIDTH, _MAPS = 64, 5
_TAPPED = tuple(range(1, _MAPS + 1))
# Forms beside a fuser's defaults that answer the table's questions otherwise.
_FORMS: dict[str, list[dict[str, Any]]] = {
    "concat": [{"resize": "bilinear"}],
    "dense_connector": [{"mode": "sci"}, {"mode": "sti"}],
    "depth_attention": [{"logits": "own"}],
    "scalar_mix": [{"normalise": "none"}],
}


def fuser_forms() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return names and options of every fuser that layerfuse registers, by what the row is called."""
    forms = {}
    for name in sorted(FUSERS.names()):
        if not FUSERS.get(name).__module__.startswith("layerfuse."):
            continue  # of a package that somebody has installed beside
        for options in ({}, *_FORMS.get(name, [])):
            said = "".join(f", {option}={value!r}" for option, value in options.items()).replace("'", '"')
            forms[f"{name}{said}"] = (name, options)
    return forms


class FuserTrial:
    """The fusers of one row."""

    def __init__(self, form: tuple[str, Mapping[str, Any]]) -> None:
        self.name, self.options = form

    def build(self, in_channels: int | Sequence[int] = _WIDTH, num_layers: int = _MAPS) -> Fuser:
        """Return a fuser of few channels."""
        options = dict(self.options)
        if "condition_channels" in FUSERS.get(self.name).option_parameters():
            options["condition_channels"] = _CONDITION
        fuser = create_fuser(self.name, in_channels=in_channels, num_layers=num_layers, options=options)
        randomise_parameters(fuser, std=0.02)
        return fuser.eval()

    @cached_property
    def cost(self) -> FuserCost:
        """The cost at the table's size, once a fuser of it has fused one image into as many tokens."""
        fuser = self.build(CHANNELS, NUM_LAYERS)
        cost = fuser.cost([GRID] * NUM_LAYERS)
        features = random_features(CHANNELS, num_layers=NUM_LAYERS, grids=GRID, batch_size=1)
        shape = tuple(fuse(fuser, features).shape)
        if shape != (1, cost.num_tokens, cost.out_channels):
            raise DifferenceError(f"tokens of shape {shape} came of a fuser that promised {cost}")
        return cost


def fuse(fuser: Fuser, features: FeatureMaps) -> torch.Tensor:
    """Return the fused tokens, with a condition where one is read."""
    condition = None if fuser.condition_channels is None else _conditions(features.batch_size)
    with torch.no_grad():
        tokens: torch.Tensor = fuser(features, condition)
    if tokens.shape[1] != fuser.num_tokens(features.grids) or not tokens.isfinite().all():
        raise DifferenceError(f"{tokens.shape[1]} tokens came where {fuser.num_tokens(features.grids)} were promised")
    return tokens


def _conditions(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, _CONDITION, generator=torch.Generator().manual_seed(seed))


def _parameters(trial: FuserTrial) -> str:
    return f"{trial.cost.parameters:,}"


def _flops(trial: FuserTrial) -> str:
    flops = trial.cost.flops
    for unit, name in ((10**9, "G"), (10**6, "M")):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}"
    return str(flops)


def _tokens(trial: FuserTrial) -> str:
    return f"{trial.cost.num_tokens} × {trial.cost.out_channels}"


def _any_number(trial: FuserTrial) -> str:
    least = 0
    for number in (7, 4, 3, 2, 1):
        try:
            fuse(trial.build(num_layers=number), random_features(_WIDTH, num_layers=number, grids=(6, 6)))
        except InputError:
            break
        least = number
    if not least:
        fuse(trial.build(num_layers=7), random_features(_WIDTH, num_layers=7, grids=(6, 6)))
    return "any" if least == 1 else f"from {least}"


def _mixed_grids(trial: FuserTrial) -> str:
    grids: list[Grid] = [(8, 8), (3, 5), (6, 6), (8, 8), (6, 6)]
    fuse(trial.build(), random_features(_WIDTH, grids=grids))
    return YES


def _mixed_widths(trial: FuserTrial) -> str:
    widths = [_WIDTH, _WIDTH // 2, _WIDTH, _WIDTH, _WIDTH]
    fuse(trial.build(widths), random_features(widths, grids=(6, 6)))
    return YES


def _text(trial: FuserTrial) -> str:
    fuser, features = trial.build(), random_features(_WIDTH, num_layers=_MAPS, num_prefix_tokens=1)
    with torch.no_grad():
        one, other = (fuser(features, _conditions(2, seed)) for seed in (1, 2))
    if torch.equal(one, other):
        raise DifferenceError("the condition changes nothing")
    return YES


def _anyres(trial: FuserTrial) -> str:
    from integrations.llava.config import ModelConfig
    from integrations.llava.modeling.tiling import pack_tiles, recipe_layout

    backbone = tiny_backbone(layers=_TAPPED, num_blocks=_MAPS, embed_dim=_WIDTH, image_size=48)
    fuser = trial.build()
    layout = recipe_layout(ModelConfig(image_layout="anyres"), backbone, fuser, image_token_id=0)
    size = (48, 96)
    tiles = random_images(layout.num_tiles(size), size=48)
    with torch.no_grad():
        tokens = fuse(fuser, backbone(tiles))
    packed = pack_tiles(tokens, layout, size, torch.zeros(fuser.out_channels))  # type: ignore[arg-type]
    if len(packed) != layout.num_tokens(size):
        raise DifferenceError(f"{len(packed)} tokens came of an image that should have {layout.num_tokens(size)}")
    return YES


def _onnx(trial: FuserTrial) -> str:
    encoder = FusedEncoder(tiny_backbone(layers=_TAPPED, num_blocks=_MAPS, embed_dim=_WIDTH), trial.build()).eval()
    inputs = (random_images(2), *(() if encoder.fuser.condition_channels is None else (_conditions(2),)))
    with torch.no_grad():
        expected = encoder(*inputs)
        actual = run_onnx(encoder, inputs)
    check_close(actual, expected, 1e-4)
    return YES


FUSER_COLUMNS: dict[str, TrialColumn] = {
    "parameters": TrialColumn(_parameters, ("cost",)),
    "FLOPs": TrialColumn(_flops, ("cost",)),
    "tokens": TrialColumn(_tokens, ("cost",)),
    "maps": TrialColumn(_any_number),
    "grids": TrialColumn(_mixed_grids),
    "widths": TrialColumn(_mixed_widths),
    "text": TrialColumn(_text),
    "AnyRes": TrialColumn(_anyres),
    "ONNX": TrialColumn(_onnx),
}
