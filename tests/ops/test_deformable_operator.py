"""The operator of deformable attention: its gradient, and what torch's own tools make of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from layerfuse.ops import MultiScaleDeformableAttention, deformable_attention, set_implementation
from layerfuse.ops.deformable.operator import KERNELS, attend
from layerfuse.testing import randomise_parameters

GRIDS = [(4, 3), (2, 5)]
FLAT = [4, 3, 2, 5]
# A name that is no kernel stands for one that cannot run here: what takes its place is computed.
NAMES = ["none", *KERNELS]


def _inputs(dtype: torch.dtype = torch.float64, batch_size: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(batch_size, 22, 3, 4, generator=generator, dtype=torch.float64)
    locations = torch.rand(batch_size, 5, 3, 2, 2, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.randn(batch_size, 5, 3, 2, 2, generator=generator, dtype=torch.float64)
    precision = torch.promote_types(dtype, torch.float32)
    return (
        value.to(dtype).requires_grad_(),
        locations.to(precision).requires_grad_(),
        weights.to(precision).requires_grad_(),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torchs_own_check_of_operators_passes(name: str, dtype: torch.dtype) -> None:
    inputs = _inputs(dtype)
    torch.library.opcheck(torch.ops.layerfuse.deformable_attention.default, (*inputs, FLAT, name))
    grad_output = torch.randn(2, 5, 12, dtype=torch.float64).to(dtype)
    arguments = (grad_output, *(tensor.detach() for tensor in inputs), FLAT, name, [True, False, True])
    torch.library.opcheck(torch.ops.layerfuse.deformable_attention_backward.default, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(lambda v, x, w: attend(v, GRIDS, x, w, name), _inputs(batch_size=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("asked", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_only_gradients_that_are_asked_for_are_computed(
    name: str, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs()
    every = torch.autograd.grad(attend(inputs[0], GRIDS, *inputs[1:], name).sin().sum(), inputs)
    frozen = [tensor.detach().requires_grad_(place in asked) for place, tensor in enumerate(inputs)]
    computed: list[list[bool]] = []
    operator = torch.ops.layerfuse.deformable_attention_backward

    def noted(*arguments: object) -> tuple[torch.Tensor, ...]:
        gradients: tuple[torch.Tensor, ...] = operator(*arguments)
        computed.append([gradient.numel() > 0 for gradient in gradients])
        return gradients

    monkeypatch.setattr(torch.ops.layerfuse, "deformable_attention_backward", noted)
    attend(frozen[0], GRIDS, frozen[1], frozen[2], name).sin().sum().backward()
    assert computed == [[place in asked for place in range(3)]]
    for place, tensor in enumerate(frozen):
        if place in asked:
            torch.testing.assert_close(tensor.grad, every[place])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_a_result_may_be_used_twice(name: str) -> None:
    inputs = _inputs()
    output = attend(inputs[0], GRIDS, *inputs[1:], name)
    first = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    both = torch.autograd.grad(output.sum() + (2 * output).sum(), inputs)
    for once, thrice in zip(first, both, strict=True):
        torch.testing.assert_close(3 * once, thrice)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_gradient_is_refused(name: str) -> None:
    inputs = _inputs()
    gradients = torch.autograd.grad(attend(inputs[0], GRIDS, *inputs[1:], name).sum(), inputs, create_graph=True)
    with pytest.raises(ValueError, match="the gradient of its gradient.*differentiable once"):
        torch.autograd.grad(gradients[2].sum(), inputs)


@pytest.mark.parametrize("implementation", ["auto", *KERNELS])
def test_torch_func_transforms_it(implementation: str) -> None:
    value, locations, weights = (tensor.detach() for tensor in _inputs())

    def total(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        inputs = (value[None], GRIDS, locations[None], weights[None])
        return deformable_attention(*inputs, implementation=implementation).sin().sum()

    of_each = torch.func.vmap(torch.func.grad(total))(value, locations, weights)
    for image in range(2):
        expected = torch.func.grad(total)(value[image], locations[image], weights[image])
        torch.testing.assert_close(of_each[image], expected)


@pytest.mark.parametrize("implementation", ["auto", *KERNELS])
def test_forward_differentiation_is_refused_not_lost(implementation: str) -> None:
    value, locations, weights = (tensor.detach() for tensor in _inputs())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward AD"):
        dual = forward_ad.make_dual(value, value)
        deformable_attention(dual, GRIDS, locations, weights, implementation=implementation)


# The layer around it


GRID = (3, 4)


def _layer() -> tuple[MultiScaleDeformableAttention, torch.Tensor]:
    torch.manual_seed(0)
    layer = randomise_parameters(MultiScaleDeformableAttention(32, num_heads=4))
    return layer, torch.randn(2, 12, 32)


def _attend_within(layer: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(tokens: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor = layer(tokens, GRID, tokens, [GRID])
        return attended

    return run


def _gradients(
    run: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, layer: torch.nn.Module
) -> list[torch.Tensor]:
    leaf = tokens.detach().requires_grad_()
    output = run(leaf)
    layer.zero_grad()
    output.square().sum().backward()
    return [
        output.detach(),
        *(tensor.grad.clone() for tensor in (leaf, *layer.parameters()) if tensor.grad is not None),
    ]


@pytest.mark.parametrize("implementation", ["auto", *KERNELS])
def test_a_layer_gives_the_same_compiled_and_checkpointed(implementation: str) -> None:
    layer, tokens = _layer()
    set_implementation(layer, implementation)
    run = _attend_within(layer)
    expected = _gradients(run, tokens, layer)
    ways = {
        "compiled": torch.compile(run, fullgraph=True, backend="aot_eager"),
        "checkpointed": lambda leaf: checkpoint(run, leaf, use_reentrant=False),
        "checkpointed, reentrant": lambda leaf: checkpoint(run, leaf, use_reentrant=True),
    }
    for way, changed in ways.items():
        for ours, theirs in zip(_gradients(changed, tokens, layer), expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda message, way=way: f"{way}: {message}")


class _Attending(torch.nn.Module):
    def __init__(self, layer: MultiScaleDeformableAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor = self.layer(tokens, GRID, tokens, [GRID])
        return attended


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("implementation", ["auto", *KERNELS])
def test_a_layer_is_exported_for_batches_of_any_size(implementation: str, strict: bool) -> None:
    layer, tokens = _layer()
    set_implementation(layer, implementation)
    module = _Attending(copy.deepcopy(layer)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (tokens,), dynamic_shapes=({0: batch},), strict=strict)
    for size in (1, 3):
        more = torch.randn(size, 12, 32)
        torch.testing.assert_close(program.module()(more), module(more))


def test_what_onnx_is_given_holds_no_operator_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, tokens = _layer()
    module = _Attending(layer).eval()

    def operators() -> list[str]:
        program = torch.export.export(module, (tokens,), strict=False)
        torch.testing.assert_close(program.module()(tokens), module(tokens))
        return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("layerfuse")]

    assert operators() == ["layerfuse.deformable_attention.default"]
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert operators() == []
