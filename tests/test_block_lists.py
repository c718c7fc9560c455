"""Block lists: entries that are one block each, counted as the model was built with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layerfuse import tap
from layerfuse.backbones import ModuleBackbone
from layerfuse.errors import InputError, TapError
from layerfuse.taps import find_blocks, get_blocks
from layerfuse.testing import TinyViT, random_images
from tests.tap_support import Block, Chain, tokens

FACTS = {"embed_dim": 32, "num_prefix_tokens": 1, "patch_size": 8, "image_size": 32}


def shared() -> nn.ModuleList:
    return nn.ModuleList([Block(), Block()] * 3)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (shared(), r"'blocks' has 6 entries, but only 2 different modules \(Block, Block in several places\)"),
        (nn.Sequential(*[Block()] * 3), "3 entries, but only 1 different modules"),
        (
            nn.ModuleList(nn.ModuleList([nn.MultiheadAttention(4, 1), nn.Linear(4, 4)]) for _ in range(3)),
            "entry 1 .* is an ModuleList of MultiheadAttention, Linear, which never runs as a whole",
        ),
        (
            nn.ModuleList(nn.Sequential(Block(), Block(), Block()) for _ in range(4)),
            r"entry 1 .* is a Sequential of several equal blocks.*block_chunks=0.*blocks='blocks.0'",
        ),
    ],
)
def test_shared_blocks_chunks_and_pairs_are_refused_before_anything_is_changed(blocks, message: str) -> None:
    model = Chain(blocks)
    before = len(blocks)
    assert find_blocks(model) == "blocks"
    with pytest.raises(InputError, match=message):
        tap(model, -1)
    with pytest.raises(InputError, match=message):
        ModuleBackbone(model, layers=1, **FACTS)
    assert len(blocks) == before


def test_shared_blocks_may_share_parameters_only() -> None:
    first = Block()
    blocks = nn.ModuleList(Block() for _ in range(4))
    for block in blocks:
        block.linear = first.linear
    with tap(Chain(blocks), (1, 4)) as tapped:
        tapped.model(tokens())
    assert len(tapped.hidden_states) == 2


def test_blocks_that_are_sequences_of_unlike_parts_are_blocks() -> None:
    class Residual(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x)

    def block() -> nn.Sequential:
        return nn.Sequential(Residual(nn.Linear(4, 4)), Residual(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))))

    blocks = nn.Sequential(block(), block(), block())
    assert len(get_blocks(Chain(blocks), "blocks")) == 3


def test_compiled_blocks_are_blocks() -> None:
    model = Chain()
    with tap(model, (0, 1, 4)) as plain:
        model(tokens())
    model.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in model.blocks)
    with tap(model, (0, 1, 4), blocks="blocks") as tapped:
        model(tokens())
    torch.testing.assert_close(tapped.hidden_states, plain.hidden_states)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is on its way out
def test_scripted_blocks_are_refused() -> None:
    blocks = nn.ModuleList([Block(), torch.jit.script(Block())])
    with pytest.raises(InputError, match="entry 2 of the block list 'blocks' was scripted"):
        tap(Chain(blocks), 1, blocks="blocks")


def test_an_empty_entry_or_list_is_refused() -> None:
    model = Chain()
    model.blocks[2] = None
    with pytest.raises(InputError, match="entry 3 of the block list 'blocks' is None"):
        tap(model, 1, blocks="blocks")
    with pytest.raises(InputError, match="no block list at 'blocks'"):
        tap(Chain(nn.ModuleList()), 1, blocks="blocks")


def test_a_model_that_was_cut_is_counted_as_it_was_built() -> None:
    model = TinyViT()
    depth = len(model.blocks)
    whole = copy.deepcopy(model)
    first = ModuleBackbone(model, layers=2, **FACTS).eval()
    second = ModuleBackbone(model, layers=(1, 2 - depth - 1), **FACTS).eval()
    assert second.num_blocks == depth
    assert second.layers == (1, 2)
    with pytest.raises(InputError, match=rf"layer {depth} is gone.*cut it after block 2 of {depth}.*layers 0..2"):
        ModuleBackbone(copy.deepcopy(model), layers=-1, **FACTS)
    with pytest.raises(InputError, match=f"layer {depth} is gone"):
        tap(model, -1)
    expected = ModuleBackbone(whole, layers=2, **FACTS).eval()(random_images())
    for backbone in (first, second):
        torch.testing.assert_close(backbone(random_images()).layer(2), expected.layer(2), rtol=0, atol=0)


def test_a_model_cut_before_its_first_block_has_layer_0_only() -> None:
    model = TinyViT()
    ModuleBackbone(model, layers=0, **FACTS)
    assert ModuleBackbone(model, layers=0, **FACTS)(random_images()).layers == (0,)
    with pytest.raises(InputError, match=r"layer 1 is gone.*layers 0..0"):
        ModuleBackbone(model, layers=1, **FACTS)


def test_a_backbone_whose_blocks_a_second_one_cut_off_is_refused() -> None:
    model = TinyViT()
    first = ModuleBackbone(model, layers=(1, 2), **FACTS)
    ModuleBackbone(model, layers=1, **FACTS)
    with pytest.raises(TapError, match=r"layers \[2\] did not run.*another backbone made from this model"):
        first(random_images())
