"""Taps and the whole encoder, ViT-L/14-336 with five taps and MMFuser, against what transformers and timm offer.

python -m benchmarks.encoder
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from benchmarks.goals import ALL_STATES, SELECTED, STOP_EARLY
from benchmarks.measure import Call, Timing, captured, relative_error, time_in_turn
from benchmarks.memory import held_bytes
from benchmarks.session import Session
from layerfuse import FeatureMaps, FusedEncoder, create_encoder
from layerfuse.backbones import Backbone, create_backbone
from layerfuse.testing import randomise_parameters

__all__ = ["LAYERS", "clip_tower", "run"]

LAYERS = (3, 8, 13, 18, 23)
_DEPTH = 24
_TAPS, _TAPS_TIMM, _ENCODER = "taps, transformers", "taps, timm", "mmfuser"
# Of a tapped state against the peer's; in bfloat16 the same numbers through the same kernels.
_TOLERANCE = 1e-4

Candidates = dict[str, Callable[[torch.Tensor], Any]]


def run(session: Session) -> None:
    """Measure taps, what they hold, and the encoder; compiled ones in a full run only."""
    dtype = torch.bfloat16 if session.goals_of == "cuda" else torch.float32
    tower = clip_tower(session).to(session.device, dtype)
    encoder = create_encoder(deepcopy(tower), layers=LAYERS, fuser="mmfuser", **_fuser_options(session))
    randomise_parameters(encoder.fuser, std=0.02)
    encoder.to(session.device, dtype)
    candidates = _transformers(session, tower, encoder.backbone)
    with session.attempt("taps", STOP_EARLY):
        candidates |= _timm(session, dtype)
    candidates[_ENCODER] = encoder
    for batch_size in (1, 4):
        case = f"B={batch_size} {str(dtype).removeprefix('torch.')}"
        facts = {"batch_size": batch_size, "dtype": str(dtype).removeprefix("torch."), "layers": LAYERS}
        images = _images(session, batch_size, dtype)
        with session.attempt("encoder", _ENCODER, case=case):
            if batch_size == 1:
                _check(candidates, images)
                _hold(session, candidates, images, case=case, **facts)
            _compare(session, candidates, images, case, facts)
    _compiled(session, tower, encoder, dtype)


def clip_tower(session: Session) -> nn.Module:
    """Return a CLIPVisionModel of 24 blocks with random weights: ViT-L/14-336, or a narrow one."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    width, image, heads = _sizes(session)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=_DEPTH,
        num_attention_heads=heads,
        image_size=image,
        patch_size=14,
        projection_dim=width,
    )
    config._attn_implementation = "sdpa"
    return CLIPVisionModel(config).eval()


def _sizes(session: Session) -> tuple[int, int, int]:
    """Width, edge of an image and number of heads."""
    return session.pick((1024, 336, 16), (256, 224, 4), (32, 28, 2))


def _fuser_options(session: Session) -> dict[str, Any]:
    return {"fuser_options": {"num_heads": _sizes(session)[2]}}


def _images(session: Session, batch_size: int, dtype: torch.dtype) -> torch.Tensor:
    edge = _sizes(session)[1]
    generator = torch.Generator().manual_seed(session.seed)
    return torch.randn(batch_size, 3, edge, edge, generator=generator).to(session.device, dtype)


def _transformers(session: Session, tower: nn.Module, backbone: Backbone) -> Candidates:
    def selected(images: torch.Tensor) -> Any:
        return tower(pixel_values=images, output_hidden_states=list(LAYERS))

    found: Candidates = {ALL_STATES: lambda images: tower(pixel_values=images, output_hidden_states=True)}
    with torch.no_grad():
        states = selected(_images(session, 1, next(tower.parameters()).dtype)).hidden_states
    # 5.17 takes the list and gives something else.
    if len(states) == _DEPTH + 1 and all((states[k] is not None) == (k in LAYERS) for k in range(_DEPTH + 1)):
        found[SELECTED] = selected
    else:
        why = "this version of transformers cannot select hidden states"
        for benchmark in ("taps", "encoder"):
            session.not_measured(benchmark, SELECTED, why)
    return {**found, _TAPS: backbone}


def _timm(session: Session, dtype: torch.dtype) -> Candidates:
    from timm.models.vision_transformer import VisionTransformer

    width, image, heads = _sizes(session)
    model = VisionTransformer(
        *(image, 14),
        embed_dim=width,
        depth=_DEPTH,
        num_heads=heads,
        pre_norm=True,
        num_classes=0,
        norm_layer=nn.LayerNorm,
    )
    model = model.eval().to(session.device, dtype)
    taps = create_backbone(deepcopy(model), layers=LAYERS).to(session.device, dtype)
    indices = [layer - 1 for layer in LAYERS]

    def stop_early(images: torch.Tensor) -> Any:
        return model.forward_intermediates(
            images, indices=indices, stop_early=True, output_fmt="NLC", intermediates_only=True
        )

    return {STOP_EARLY: stop_early, _TAPS_TIMM: taps.eval()}


def _check(candidates: Candidates, images: torch.Tensor) -> None:
    """Refuse to time taps that are not the states which the peer gives."""
    with torch.no_grad():
        pairs = [(candidates[_TAPS](images), [s[:, 1:] for s in _states(candidates[ALL_STATES](images))])]
        if STOP_EARLY in candidates:
            pairs.append((candidates[_TAPS_TIMM](images), candidates[STOP_EARLY](images)))
    for maps, states in pairs:
        assert isinstance(maps, FeatureMaps)
        error = max(relative_error(ours, theirs) for ours, theirs in zip(maps, states, strict=True))
        if not error < _TOLERANCE:
            raise AssertionError(f"a tapped state differs from the peer's by {error:.2g}")


def _states(output: Any) -> list[torch.Tensor]:
    return [output.hidden_states[layer] for layer in LAYERS]


def _hold(session: Session, candidates: Candidates, images: torch.Tensor, *, case: str, **facts: Any) -> None:
    """Record what the results keep alive: all of what a call gives back."""
    held = {}
    with torch.no_grad():
        for label in (ALL_STATES, SELECTED, STOP_EARLY, _TAPS, _TAPS_TIMM):
            if label in candidates:
                held[label] = held_bytes(candidates[label](images))
    session.compare_values("taps, memory held", held, ours=(_TAPS, _TAPS_TIMM), unit="bytes", case=case, **facts)


def _compare(session: Session, candidates: Candidates, images: torch.Tensor, case: str, facts: dict[str, Any]) -> None:
    # On the CPU a batch of 4 takes four times as long and tells no more of the taps.
    small = len(images) == 1 or session.device == "cuda"
    labels = [label for label in candidates if small or label in (ALL_STATES, SELECTED, _ENCODER)]
    calls = {label: _call(candidates[label], images) for label in labels}
    # After a batch of one all is warm; a batch of four takes a CPU ten seconds and more.
    pace = session.pace(60.0 if session.device == "cpu" else 3.0, fewest=5)
    if not small:
        pace = dataclasses.replace(pace, fewest=session.pick(5, 2, 1), warm=True)
    timings = time_in_turn(calls, device=session.device, pace=pace)
    if small:
        _record(session, "taps", timings, (ALL_STATES, SELECTED, _TAPS), (_TAPS,), case, facts)
        _record(session, "taps", timings, (STOP_EARLY, _TAPS_TIMM), (_TAPS_TIMM,), case, facts)
    _record(session, "encoder", timings, (ALL_STATES, SELECTED, _ENCODER), (_ENCODER,), case, facts)
    if session.device == "cuda":
        replays = {label: captured(calls[label]) for label in (ALL_STATES, _ENCODER)}
        pace = session.pace(2.0, fewest=10)
        session.compare("encoder, CUDA graph", replays, ours=(_ENCODER,), pace=pace, case=case, facts=facts)


def _record(
    session: Session,
    benchmark: str,
    timings: dict[str, Timing],
    labels: tuple[str, ...],
    ours: tuple[str, ...],
    case: str,
    facts: dict[str, Any],
) -> None:
    chosen = {label: timings[label] for label in labels if label in timings}
    session.record_timings(benchmark, chosen, ours=ours, case=case, facts=facts)


def _call(candidate: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return candidate(images)

    return call


def _compiled(session: Session, tower: nn.Module, encoder: FusedEncoder, dtype: torch.dtype) -> None:
    """Compiled against compiled, in a row of its own."""
    benchmark = "encoder, both compiled"
    if session.scale == "quick":
        return
    if session.scale == "full" and session.device == "cpu" and shutil.which("c++") is None:
        session.not_measured(benchmark, _ENCODER, "there is no C++ compiler, which torch.compile needs on the CPU")
        return
    # On the CPU what comes behind takes two minutes more.
    if not session.has_time(210 if session.device == "cpu" else 120, benchmark, _ENCODER):
        return
    images = _images(session, 1, dtype)
    compiled = {
        ALL_STATES: session.compile(lambda images: tower(pixel_values=images, output_hidden_states=True)),
        _ENCODER: session.compile(encoder),
    }
    with session.attempt(benchmark, _ENCODER):
        calls = {label: _call(function, images) for label, function in compiled.items()}
        facts = {"batch_size": 1, "dtype": str(dtype).removeprefix("torch."), "layers": LAYERS}
        pace = session.pace(30.0, fewest=3)
        session.compare(benchmark, calls, ours=(_ENCODER,), pace=pace, case="B=1", facts=facts)


if __name__ == "__main__":
    from benchmarks.command import main

    main("encoder")
