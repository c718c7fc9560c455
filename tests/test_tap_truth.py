"""Taps tell the truth or refuse: changes in place, hooks behind ours, blocks that are no blocks or run twice or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from layerfuse import tap
from layerfuse.backbones import ModuleBackbone
from layerfuse.errors import TapError
from layerfuse.taps import BlockTaps
from layerfuse.testing import TinyViT, random_images
from tests.tap_support import Block, Chain, tokens

FACTS = {"embed_dim": 32, "num_prefix_tokens": 1, "patch_size": 8, "image_size": 32}


def add_in_place(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Change what a module is about to receive."""
    args[0].add_(1)


class InPlaceBlock(Block):
    """A residual block that adds to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += torch.tanh(self.linear(x.clone()))
        return x


def in_place_chain() -> Chain:
    return Chain(nn.ModuleList(InPlaceBlock() for _ in range(4)))


def true_layers(model: Chain) -> list[torch.Tensor]:
    """Copy the hidden states 0..4 as the blocks make them."""
    hidden = model.embed(tokens())
    layers = [hidden.clone()]
    for block in model.blocks:
        hidden = block(hidden)
        layers.append(hidden.clone())
    return layers


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_change_in_place_in_the_next_block_is_refused(mode) -> None:
    model = in_place_chain()
    message = r"layers \[0, 3\] put out was changed in place.*copy_maps=True"
    with mode(), pytest.raises(TapError, match=message), tap(model, (0, 3, 4)):
        model(tokens())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_layers_changed_in_place_are_right_when_copied(mode) -> None:
    model = in_place_chain()
    with mode():
        expected = true_layers(model)
        with tap(model, (0, 1, 4), copy_maps=True) as tapped:
            model(tokens())
    torch.testing.assert_close(tapped.hidden_states, (expected[0], expected[1], expected[4]), rtol=0, atol=0)


def test_layers_changed_in_place_are_right_in_inference_mode_which_counts_no_versions() -> None:
    model = in_place_chain()
    with torch.inference_mode():
        expected = true_layers(model)
        with tap(model, (0, 1, 4)) as tapped:
            model(tokens())
    torch.testing.assert_close(tapped.hidden_states, (expected[0], expected[1], expected[4]), rtol=0, atol=0)


def test_the_deepest_layer_of_blocks_that_work_in_place_needs_no_copy() -> None:
    model = in_place_chain()
    with torch.no_grad():
        expected = true_layers(model)[3]
        with tap(model, 3, stop_early=True) as tapped:
            model(tokens())
    torch.testing.assert_close(tapped.hidden_states[0], expected, rtol=0, atol=0)


def test_a_change_in_place_after_the_last_block_is_refused() -> None:
    model = Chain(run=lambda model, hidden: nn.Sequential(*model.blocks)(hidden).mul_(2))
    with torch.no_grad(), pytest.raises(TapError, match=r"layers \[4\].*in place"), tap(model, -1):
        model(tokens())


def test_a_change_in_place_by_a_later_hook_is_refused() -> None:
    model = Chain()
    model.norm.register_forward_pre_hook(add_in_place)
    with torch.no_grad(), pytest.raises(TapError, match=r"layers \[4\].*in place"), tap(model, (1, 4)):
        model(tokens())


def test_a_change_in_place_of_a_copy_is_none() -> None:
    model = Chain(run=lambda model, hidden: nn.Sequential(*model.blocks)(hidden).clone().zero_())
    with torch.no_grad(), tap(model, (1, 4)) as tapped:
        model(tokens())
    assert tapped.hidden_states[1].abs().sum() > 0


def test_traced_blocks_that_work_in_place_give_the_true_layers() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = in_place_chain()
            self.taps = BlockTaps(self.model.blocks, (0, 1, 4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.taps.run(self.model, x)

    tapped = Tapped()
    with torch.no_grad():
        expected = true_layers(tapped.model)
        for traced in (
            torch.compile(tapped, fullgraph=True, backend="aot_eager"),
            torch.export.export(tapped, (tokens(),)).module(),
        ):
            torch.testing.assert_close(traced(tokens()), (expected[0], expected[1], expected[4]))


class InPlaceViT(TinyViT):
    """A Vision Transformer that adds positions to its hidden states in place, before block 2."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].register_forward_pre_hook(add_in_place)


def test_a_backbone_refuses_what_was_changed_in_place_unless_it_copies() -> None:
    torch.manual_seed(0)
    backbone = ModuleBackbone(InPlaceViT(), layers=(1, 2), **FACTS).eval()
    with torch.no_grad():
        with pytest.raises(TapError, match=r"layers \[1\].*in place"):
            backbone(random_images())
        backbone.copy_maps = True
        maps = backbone(random_images()).maps
        backbone.model.blocks[1]._forward_pre_hooks.clear()
        torch.testing.assert_close(maps[0], backbone(random_images()).maps[0], rtol=0, atol=0)
    assert ModuleBackbone(TinyViT(), layers=1, copy_maps=True, **FACTS).copy_maps


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_layer_is_what_the_next_block_receives_whatever_hooks_stand_there(when: str) -> None:
    model = TinyViT().eval()
    received: list[torch.Tensor] = []

    def steer() -> None:
        model.blocks[0].register_forward_hook(lambda module, args, output: output + 1)
        model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model.blocks[1].register_forward_hook(lambda module, args, output: output * 3)
        model.blocks[0].register_forward_pre_hook(lambda module, args: received.append(args[0]))
        model.blocks[1].register_forward_pre_hook(lambda module, args: received.append(args[0]))
        model.blocks[1].register_forward_hook(lambda module, args, output: received.append(output))

    if when == "before":
        steer()
    backbone = ModuleBackbone(model, layers=(0, 1, 2), **FACTS)
    if when == "after":
        steer()
    features = backbone(random_images())
    for feature_map, hidden in zip(features.maps, received, strict=True):
        torch.testing.assert_close(feature_map, hidden[:, 1:], rtol=0, atol=0)


def test_a_hook_that_changes_what_the_next_block_receives_before_it_is_refused() -> None:
    model = Chain()
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(TapError, match="what block 1 puts out is not what block 2 receives"), tap(model, (1, 4)):
        model(tokens())
    with tap(model, (2, 4)) as tapped:
        model(tokens())
    assert len(tapped.hidden_states) == 2


def test_a_hook_added_behind_the_taps_is_refused() -> None:
    model = Chain()
    with pytest.raises(TapError, match="a hook was added at layer 2 after the taps"), tap(model, (2, 3)):
        model.blocks[1].register_forward_hook(lambda module, args, output: output + 1)
        model(tokens())
    model = Chain()
    with pytest.raises(TapError, match="a hook was added at layer 0"), tap(model, 0):
        model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        model(tokens())


def test_two_taps_at_once_are_no_hooks_behind_one_another() -> None:
    model = Chain()
    with tap(model, (0, 2)) as outer, tap(model, (0, 2)) as inner:
        model(tokens())
    torch.testing.assert_close(outer.hidden_states, inner.hidden_states, rtol=0, atol=0)


def test_a_residual_sum_outside_the_blocks_is_refused() -> None:
    def run(model: Chain, hidden: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            hidden = hidden + block(hidden)
        return hidden

    for layers in ((1, 2), 4):
        with pytest.raises(TapError, match="residual sum outside the blocks"), tap(Chain(run=run), layers) as tapped:
            tapped.model(tokens())


@pytest.mark.parametrize(
    "move",
    [
        lambda hidden: hidden.clone(),
        lambda hidden: hidden.view_as(hidden),
        lambda hidden: hidden.double().float(),
        lambda hidden: hidden.clone() * torch.tensor([1, 1, 1, float("nan")]),
        lambda hidden: (hidden, None),
    ],
)
def test_the_same_values_elsewhere_are_taken(move: Callable[[torch.Tensor], object]) -> None:
    class Loose(Block):
        def forward(self, x: object) -> object:
            return move(super().forward(x[0] if isinstance(x, tuple) else x))

    def run(model: Chain, hidden: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            hidden = block(move(hidden))
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden

    with tap(Chain(nn.ModuleList(Loose() for _ in range(3)), run=run), (0, 1, 2)) as tapped:
        tapped.model(tokens())
    assert [tuple(hidden.shape) for hidden in tapped.hidden_states] == [(2, 7, 4)] * 3


def twice(model: Chain, hidden: torch.Tensor) -> torch.Tensor:
    for block in [*model.blocks, *model.blocks]:
        hidden = block(hidden)
    return hidden


def test_blocks_that_run_twice_are_refused() -> None:
    model = Chain(run=twice)
    model = Chain(run=twice)
    with pytest.raises(TapError, match=r"layers \[1, 3\] ran more than once in one call"), tap(model, (1, 3)):
        model(tokens())
    model = Chain()
    with pytest.raises(TapError, match=r"layers \[1\] ran more than once"), tap(model, 1):
        model(tokens())
        model(tokens())


def test_blocks_left_out_are_refused() -> None:
    model = Chain(run=lambda model, hidden: model.blocks[3](model.blocks[1](hidden)))
    message = r"layers \[1, 3\] did not run; asked for \(1, 2, 3\).*LayerDrop"
    with pytest.raises(TapError, match=message), tap(model, (1, 2, 3)):
        model(tokens())


@pytest.mark.parametrize("layers", [(1, 3), 4])
def test_blocks_that_run_in_another_order_are_refused(layers: int | tuple[int, ...]) -> None:
    model = Chain(run=lambda model, hidden: nn.Sequential(*reversed(model.blocks))(hidden))
    message = "layers ran in the order (3, 2, 1|4, 3), but are counted in the order of the block list"
    with pytest.raises(TapError, match=message), tap(model, layers):
        model(tokens())


def test_two_streams_in_one_block_list_are_refused() -> None:
    def run(model: Chain, hidden: torch.Tensor) -> torch.Tensor:
        return model.blocks[1](model.blocks[0](hidden)) + model.blocks[3](model.blocks[2](hidden))

    model = Chain(run=run)
    with pytest.raises(TapError, match="what block 2 puts out is not what block 3 receives"), tap(model, (2, 4)):
        model(tokens())


def test_blocks_called_by_their_forward_are_refused() -> None:
    model = Chain(run=lambda model, hidden: model.blocks[1].forward(model.blocks[0].forward(hidden)))
    with pytest.raises(TapError, match=r"did not run.*block.forward\(x\) rather than block\(x\)"), tap(model, 1):
        model(tokens())


@pytest.mark.parametrize("call", ["x", "tokens", "extra"])
def test_blocks_called_by_keyword_are_tapped(call: str) -> None:
    class Named(nn.Module):
        def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return tokens + 1

    class Anything(nn.Module):
        def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            return kwargs["x"] + 1

    def run(model: Chain, hidden: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            match call:
                case "x":
                    hidden = block(x=hidden)
                case "tokens":
                    hidden = block(tokens=hidden)
                case "extra":
                    hidden = block(mask=torch.zeros_like(hidden), tokens=hidden)
        return hidden

    model = Chain(nn.ModuleList((Anything if call == "x" else Named)() for _ in range(2)), run=run)
    with tap(model, (0, 1), blocks="blocks") as tapped:
        model(tokens())
    torch.testing.assert_close(tapped.hidden_states[0] + 1, tapped.hidden_states[1])


@pytest.mark.parametrize(
    ("value", "kind"), [(lambda x: {"hidden": x}, "dict"), (lambda x: [], "list"), (lambda x: None, "NoneType")]
)
def test_blocks_that_give_no_tensor_are_refused(value: Callable[[torch.Tensor], object], kind: str) -> None:
    class Odd(Block):
        def forward(self, x: torch.Tensor) -> object:
            return value(x)

    model = Chain(nn.ModuleList([Block(), Odd()]), run=lambda model, x: model.blocks[1](model.blocks[0](x)) and x)
    message = f"layer 2 is a {kind} where hidden states.*Odd must take and return a tensor"
    with pytest.raises(TapError, match=message), tap(model, 2, blocks="blocks"):
        model(tokens())
