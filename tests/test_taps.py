"""Layer numbers and taps on a module that the user holds."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerfuse import resolve_layers, tap
from layerfuse.taps import BlockTaps, find_blocks, get_blocks


class Block(nn.Module):
    """A block that may answer with a tuple and counts its runs."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.as_tuple = as_tuple
        self.runs = 0

    def forward(self, hidden_states: torch.Tensor):
        self.runs += 1
        out = hidden_states + self.linear(hidden_states)
        return (out, None) if self.as_tuple else out


class Transformer(nn.Module):
    """The shape of a ViT: embedding, blocks, norm; keeps what enters every block as ground truth."""

    def __init__(self, depth: int = 5, *, as_tuple: bool = False, keyword: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block(as_tuple) for _ in range(depth))
        self.norm = nn.LayerNorm(4)
        self.keyword = keyword

    def hidden_states(self, x: torch.Tensor) -> list[torch.Tensor]:
        hidden = [self.embed(x)]
        for block in self.blocks:
            out = block(hidden_states=hidden[-1]) if self.keyword else block(hidden[-1])
            hidden.append(out[0] if isinstance(out, tuple) else out)
        return hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.hidden_states(x)[-1])


def _tokens() -> torch.Tensor:
    return torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.permutations(range(n + 1)), st.data())))
def test_every_layer_is_reached_from_either_end_in_the_order_asked(case) -> None:
    num_blocks, order, data = case
    wanted = tuple(order[: data.draw(st.integers(1, len(order)))])
    asked = [layer - num_blocks - 1 if data.draw(st.booleans()) else layer for layer in wanted]
    assert resolve_layers(asked, num_blocks) == wanted


def test_paper_layers_are_the_same_from_both_ends() -> None:
    assert resolve_layers((-22, -17, -12, -7, -2), 24) == (3, 8, 13, 18, 23)
    assert resolve_layers(-2, 24) == (23,)
    assert resolve_layers((np.int64(3), np.int64(-1)), 24) == (3, 24)


@pytest.mark.parametrize(
    "layers",
    [np.array([3, -2]), torch.tensor([3, 23]), range(3, 24, 20), (layer for layer in (3, 23)), [3, np.int32(23)]],
)
def test_layers_are_taken_from_arrays_tensors_ranges_and_generators(layers) -> None:
    assert resolve_layers(layers, 24) == (3, 23)


@pytest.mark.parametrize("layer", [np.array(3), torch.tensor(3), np.int8(3)])
def test_a_layer_is_taken_from_an_array_of_no_dimension(layer) -> None:
    assert resolve_layers(layer, 24) == (3,)


@given(num_blocks=st.integers(1, 40), beyond=st.integers(1, 5))
def test_layers_outside_the_backbone_are_refused(num_blocks: int, beyond: int) -> None:
    for layer in (num_blocks + beyond, -num_blocks - 1 - beyond):
        with pytest.raises(ValueError, match=f"layer {layer} is outside this backbone \\({num_blocks} blocks: 0 = emb"):
            resolve_layers((0, layer), num_blocks)


def test_a_layer_asked_for_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="more than once \\(23 and -2; 24 blocks\\)"):
        resolve_layers((3, 23, -2), 24)
    with pytest.raises(ValueError, match="more than once \\(3 twice; 24 blocks\\)"):
        resolve_layers((3, 3), 24)


def test_layers_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer was asked for"):
        resolve_layers((), 24)
    booleans = (np.array([True, False]), torch.tensor([True]), (True,))
    unordered = ({3, 8}, {3: 8}, "-2")
    others = (np.array([[3, 8]]), np.array([[0.5, 1.0]]), None, ("3",), (3 + 0j,))
    for wrong in (*booleans, *unordered, *others):
        with pytest.raises(TypeError, match="layers must be numbers, got"):
            resolve_layers(wrong, 24)


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("stop_early", [False, True])
def test_tap_equals_the_hidden_states_and_leaves_the_model_as_found(as_tuple, keyword, stop_early) -> None:
    model = Transformer(as_tuple=as_tuple, keyword=keyword)
    with torch.no_grad():
        expected = model.hidden_states(_tokens())
        with tap(model, layers=(3, 0, -5), stop_early=stop_early) as tapped:
            model(_tokens())
    assert tapped.layers == (3, 0, 1)
    for layer, hidden in zip(tapped.layers, tapped.hidden_states, strict=True):
        torch.testing.assert_close(hidden, expected[layer], rtol=0, atol=0)
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in model.blocks)
    assert model.blocks[4].runs == (1 if stop_early else 2)


def test_tap_wraps_what_it_stored_as_feature_maps() -> None:
    model = Transformer()
    with tap(model, layers=(2, 4)) as tapped:
        model(_tokens())
    features = tapped.features(grid=(2, 3), num_prefix_tokens=1)
    assert features.grids == ((2, 3), (2, 3))
    torch.testing.assert_close(torch.cat([features.prefix[0], features.maps[0]], dim=1), tapped.hidden_states[0])
    with pytest.raises(ValueError, match="7 tokens, but its grid 2x3 has 6"):
        tapped.features(grid=(2, 3), num_prefix_tokens=0)


def test_tap_takes_its_hooks_off_when_the_model_fails() -> None:
    model = Transformer()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), tap(model, layers=1):
        model(torch.zeros(2, 7, 5))
    assert not model.blocks[0]._forward_hooks


def test_tap_says_when_the_model_did_not_run() -> None:
    with (
        pytest.raises(RuntimeError, match=r"tapped layers \[1, 2\] did not run"),
        tap(Transformer(), layers=(1, 2)),
    ):
        pass


def test_tapping_twice_at_once_is_refused() -> None:
    tapped = tap(Transformer(), layers=1)
    model_ran = tapped.model
    with tapped:
        with pytest.raises(RuntimeError, match="this model is tapped already"):
            tapped.__enter__()
        model_ran(_tokens())


def test_block_list_is_found_by_structure_or_by_path() -> None:
    model = Transformer()
    assert find_blocks(model) == "blocks"
    assert get_blocks(model, "blocks") is model.blocks
    with pytest.raises(ValueError, match="Transformer has no block list at 'layers'.*Found: blocks"):
        get_blocks(model, "layers")
    with pytest.raises(ValueError, match="Transformer has no block list at 'norm'"):
        get_blocks(model, "norm")
    two = nn.ModuleDict({"image": Transformer(), "text": Transformer()})
    with pytest.raises(ValueError, match="2 block lists \\(image.blocks, text.blocks\\); say which one"):
        find_blocks(two)
    with pytest.raises(ValueError, match="0 block lists \\(none\\)"):
        find_blocks(nn.Linear(2, 2))


class Tapped(nn.Module):
    """A model with taps set at construction, as backbones have them."""

    def __init__(self, layers: tuple[int, ...], *, checkpointed: bool = False) -> None:
        super().__init__()
        self.model = Transformer()
        self.taps = BlockTaps(self.model.blocks, layers)
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.taps.run(self._checkpoint if self.checkpointed else self.model, x)

    def _checkpoint(self, x: torch.Tensor) -> None:
        hidden = self.model.embed(x)
        for block in self.model.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False)


def test_taps_survive_copy_pickle_compile_and_export() -> None:
    tapped = Tapped((4, 0, 2))
    expected = tapped(_tokens())
    for other in (
        copy.deepcopy(tapped),
        pickle.loads(pickle.dumps(tapped)),
        torch.compile(tapped, fullgraph=True, backend="aot_eager"),
        torch.export.export(tapped, (_tokens(),)).module(),
    ):
        torch.testing.assert_close(other(_tokens()), expected)


def test_a_copy_does_not_write_into_its_original() -> None:
    tapped = Tapped((1,))
    clone = copy.deepcopy(tapped)
    nn.init.zeros_(clone.model.embed.weight)
    nn.init.zeros_(clone.model.embed.bias)
    before = tapped(_tokens())[0]

    def run_both(x: torch.Tensor) -> None:
        clone(x)
        tapped.model(x)

    torch.testing.assert_close(tapped.taps.run(run_both, _tokens())[0], before)


def test_blocks_that_run_again_in_backward_leave_nothing_stored() -> None:
    plain, checkpointed = Tapped((1, 5)), Tapped((1, 5), checkpointed=True)
    for module in (plain, checkpointed):
        sum(hidden.square().sum() for hidden in module(_tokens())).backward()
    for ours, reference in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(ours.grad, reference.grad)


def test_removed_taps_store_nothing() -> None:
    tapped = Tapped((1,))
    tapped.taps.remove()
    with pytest.raises(RuntimeError, match="did not run"):
        tapped(_tokens())
