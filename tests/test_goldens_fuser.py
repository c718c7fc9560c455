"""MMFuser against blocks recorded from the published code: output, intermediate outputs, gradients, initial state.

The goldens' README recommends output atol 5e-5, gradients within 2e-5 of the largest entry (1e-3 for entries of
sampling-offset gradients, whose points may lie on a kink), bfloat16 within 3e-2 of the largest entry.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from layerfuse.features import FeatureMaps
from layerfuse.fusers import MMFuser
from tests.goldens_support import (
    SHARED,
    FuserCase,
    from_published_names,
    fuser_files,
    parameter_of,
    published_gradients,
)

IMPLEMENTATIONS = ("gather", "reference")


def _label(path: Path) -> str:
    return f"{path.stem}-{'shared' if SHARED in path.parents else 'shipped'}"


def _cases(key: str = "output") -> list[object]:
    """One parameter set per recorded block that holds a tensor of this name."""
    return [pytest.param(path, id=_label(path)) for path in fuser_files("*.safetensors") if key in _load(path).tensors]


@cache
def _load(path: Path) -> FuserCase:
    return FuserCase(path)


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def test_the_shared_goldens_are_there() -> None:
    if not (SHARED / "fuser").is_dir():
        pytest.skip(
            f"goldens not found at {SHARED}; set LAYERFUSE_GOLDENS to their folder (the shipped case is tested)"
        )
    assert list((SHARED / "fuser").glob("*.safetensors"))


def test_the_shipped_goldens_are_there() -> None:
    assert {"d64_g6_b2.safetensors", "fresh_block.json"} <= {path.name for path in fuser_files("*")}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", _cases())
def test_output_equals_the_published_one(path: Path, implementation: str) -> None:
    case = _load(path)
    _, features = case.features()
    torch.testing.assert_close(case.fuser(implementation=implementation)(features), case.output, atol=2e-5, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", _cases())
def test_gradients_equal_the_published_ones(path: Path, implementation: str) -> None:
    case = _load(path)
    fuser = case.fuser(implementation=implementation)
    stack, features = case.features()
    fuser(features).backward(case.cotangent)
    assert stack.grad is not None
    inputs = case.expected_input_gradients()
    assert inputs
    for key, expected in inputs.items():
        assert _relative_error(case.input_gradient(key, stack.grad), expected) <= 2e-5, key
    gradients = published_gradients(fuser)
    parameters = case.expected_parameter_gradients()
    assert {parameter_of(key) for key in parameters} == set(gradients)
    for key, expected in parameters.items():
        tolerance = 1e-3 if "sampling_offsets" in key else 2e-5
        actual = case.parameter_gradient(key, gradients[parameter_of(key)])
        assert _relative_error(actual, expected) <= tolerance, key


@pytest.mark.parametrize("path", _cases("mid.cross_attn"))
def test_outputs_of_both_attentions_equal_the_published_ones(path: Path) -> None:
    case = _load(path)
    fuser = case.fuser()
    seen: dict[str, torch.Tensor] = {}
    for name in ("cross_attn", "self_attn"):
        getattr(fuser, name).register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
    fuser(case.features()[1])
    for name, output in seen.items():
        torch.testing.assert_close(output, case.tensors[f"mid.{name}"], atol=2e-5, rtol=0)
    assert set(seen) == {"cross_attn", "self_attn"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", _cases("output_bf16"))
def test_bfloat16_output_is_near_the_published_one(path: Path, implementation: str) -> None:
    case = _load(path)
    output = case.fuser(torch.bfloat16, implementation=implementation)(case.features(torch.bfloat16)[1])
    assert output.dtype == torch.bfloat16
    assert _relative_error(output, case.tensors["output_bf16"]) <= 3e-2
    assert _relative_error(output, case.output) <= 3e-2


def _fresh_blocks() -> list[object]:
    return [
        pytest.param(entry, int(name.removeprefix("d_model_")), id=f"{_label(path)}-{name}")
        for path in fuser_files("fresh_block.json")
        for name, entry in json.loads(path.read_text()).items()
        if name.startswith("d_model_")
    ]


@pytest.mark.parametrize(("entry", "channels"), _fresh_blocks())
def test_a_new_block_starts_as_the_recorded_goldens(entry: dict, channels: int) -> None:
    num_points = entry["n_points"]
    num_logits = entry["parameters"]["cross_attn.attention_weights.bias"]["shape"][0]
    num_layers = num_logits // (entry["n_heads"] * num_points) + 1
    fuser = MMFuser(
        channels,
        num_layers,
        num_heads=entry["n_heads"],
        num_points=num_points,
        norm_eps=entry["layernorm_eps"],
    )
    ours = dict(fuser.named_parameters())
    names = from_published_names(fuser)
    assert set(names) == set(entry["parameters"])
    for published, recorded in entry["parameters"].items():
        parameter = ours[names[published]].detach()
        assert list(parameter.shape) == recorded["shape"], published
        assert parameter.requires_grad is False and ours[names[published]].requires_grad is recorded["requires_grad"]
        if "constant" in recorded:
            torch.testing.assert_close(parameter, torch.full_like(parameter, recorded["constant"]), atol=0, rtol=0)
        elif "values" in recorded:
            torch.testing.assert_close(parameter, torch.tensor(recorded["values"]), atol=1e-6, rtol=0)
        else:
            bound = recorded["xavier_uniform_bound"]
            # Both are random: how near they come depends on how many numbers there are.
            count = parameter.numel()
            assert (1 - 10 / count) * bound < parameter.abs().max() <= bound, published
            assert parameter.std().item() == pytest.approx(recorded["observed_std"], rel=4 / count**0.5), published
    assert sum(parameter.numel() for parameter in fuser.parameters()) == entry["n_parameters"]
    assert [name for name, _ in fuser.named_buffers()] == entry["buffers"]
    norms = [module.eps for module in fuser.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms == [entry["layernorm_eps"]] * 3
    stack = torch.randn(num_layers, 1, 16, channels)
    features = FeatureMaps(maps=tuple(stack), layers=tuple(range(num_layers)), grids=((4, 4),) * num_layers)
    assert torch.equal(fuser(features), stack[-1]) is entry["output_equals_query_exactly"]
