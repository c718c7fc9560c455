"""Blocks and patches that are left out, in chunks or merged: the maps are the model's own, or a refusal names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from layerfuse import tap
from layerfuse.backbones import Backbone, ModuleBackbone, OpenClipBackbone, TimmBackbone, TransformersBackbone
from layerfuse.errors import InputError, TapError
from layerfuse.testing import random_images, randomise_parameters
from tests.backbones.zoo import hugging_face, open_clip_native, open_clip_timm, timm_model

EDGE = 48
WIDTH = 16
FACTS: dict[str, Any] = {"embed_dim": WIDTH, "num_prefix_tokens": 1, "patch_size": 16, "image_size": EDGE}


class Block(nn.Module):
    """A residual block, whose sum may leave out some images of a batch in training, as DINOv2's stochastic depth."""

    def __init__(self, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drop_rate = drop_rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.drop_rate):
            return x + self.linear(self.norm(x))
        chosen = torch.randperm(len(x))[: max(1, int(len(x) * (1 - self.drop_rate)))]
        return torch.index_add(x, 0, chosen, self.linear(self.norm(x[chosen])))


class BlockChunk(nn.ModuleList):
    """A stretch of blocks in a model that is sharded chunk by chunk, as in DINOv2's training code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = block(x)
        return x


class LayerDropList(nn.ModuleList):
    """A list that leaves out entries where it is iterated in training, as in fairseq and torchscale."""

    dropped = (0, 2)

    def __iter__(self) -> Iterator[nn.Module]:
        for number, block in enumerate(super().__iter__()):
            if not (self.training and number in self.dropped):
                yield block


class ViT(nn.Module):
    """Patches of 16 pixels, a class token, blocks in whatever list."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 16, 16)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = blocks

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


def vit(blocks: nn.ModuleList) -> ViT:
    model = ViT(blocks)
    randomise_parameters(model, std=0.3)
    return model.eval()


def chunked(num_blocks: int, num_chunks: int) -> nn.ModuleList:
    """Chunks in which identities stand for the blocks before them, so that keys of weights keep a block's number."""
    blocks = [Block() for _ in range(num_blocks)]
    size = num_blocks // num_chunks
    return nn.ModuleList(
        BlockChunk([*(nn.Identity() for _ in range(start)), *blocks[start : start + size]])
        for start in range(0, num_blocks, size)
    )


def own_layers(model: ViT, images: torch.Tensor) -> list[torch.Tensor]:
    """Layers 0..depth, from the blocks in order, whatever list holds them."""
    found: list[torch.Tensor] = []
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    handles = [block.register_forward_hook(lambda block, args, output: found.append(output)) for block in blocks]
    handles.append(blocks[0].register_forward_pre_hook(lambda block, args: found.append(args[0])))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


# Stochastic depth: a block always runs, and its sum leaves out images.


@pytest.mark.parametrize(
    ("family", "build"),
    [
        (TimmBackbone, timm_model("vit_small_patch16_224", img_size=EDGE, drop_path_rate=0.6)),
        (TimmBackbone, timm_model("eva02_base_patch16_clip_224", img_size=EDGE, drop_path_rate=0.6)),
        (TimmBackbone, timm_model("beit_base_patch16_224", img_size=EDGE, drop_path_rate=0.6)),
        (OpenClipBackbone, open_clip_timm(timm_model("vit_small_patch16_224", img_size=EDGE, drop_path_rate=0.6))),
        (TransformersBackbone, hugging_face("dinov2", patch_size=16, drop_path_rate=0.6)),
        (TransformersBackbone, hugging_face("dinov3_vit", patch_size=16, drop_path_rate=0.6)),
        (TransformersBackbone, hugging_face("beit", patch_size=16, drop_path_rate=0.6)),
        (TransformersBackbone, hugging_face("vit", patch_size=16, hidden_dropout_prob=0.5)),
    ],
)
def test_stochastic_depth_and_dropout_give_what_the_model_computes_in_training(
    family: Callable[..., Backbone], build: Callable[[], nn.Module]
) -> None:
    backbone = family(randomise_parameters(build(), std=0.1), layers=(0, 1, 2, 3)).train()
    images = random_images(4, size=EDGE)
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda block, args, output: seen.append(output)) for block in backbone.blocks
    ]
    with torch.no_grad():
        torch.manual_seed(1)
        first = backbone(images)
        torch.manual_seed(1)
        again = backbone(images)
        other = backbone(images)
    for handle in handles:
        handle.remove()
    blocks = [states[0] if isinstance(states, tuple) else states for states in seen[:3]]
    torch.testing.assert_close(list(first)[1:], [states[:, backbone.num_prefix_tokens :] for states in blocks])
    torch.testing.assert_close(list(first), list(again), rtol=0, atol=0)
    assert not torch.equal(first.maps[-1], other.maps[-1])
    with torch.no_grad():
        torch.testing.assert_close(list(backbone.eval()(images)), list(backbone.eval()(images)), rtol=0, atol=0)


def test_stochastic_depth_over_some_images_of_a_batch_keeps_all_of_them() -> None:
    backbone = ModuleBackbone(vit(nn.ModuleList(Block(drop_rate=0.5) for _ in range(3))), layers=(1, 2, 3), **FACTS)
    backbone.train()
    images = random_images(4, size=EDGE)
    torch.manual_seed(1)
    expected = own_layers(backbone.model, images)  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        features = backbone(images)
    assert len(features.maps[0]) == 4
    torch.testing.assert_close(list(features), [states[:, 1:] for states in expected[1:]], rtol=0, atol=0)


# LayerDrop: a block does not run.


def test_layer_drop_counts_all_blocks_and_refuses_tapped_ones_that_did_not_run() -> None:
    model = vit(LayerDropList(Block() for _ in range(4)))
    images = random_images(2, size=EDGE)
    expected = own_layers(model, images)
    with torch.no_grad(), tap(model.train(), (2, 4)) as tapped:  # blocks 2 and 4 run in training
        model(images)
    assert tapped.layers == (2, 4)
    assert len(tapped.hidden_states) == 2
    message = r"tapped layers \[1, 3\] did not run.*LayerDrop: use eval mode"
    with pytest.raises(TapError, match=message), tap(model, (1, 2, 3)):
        model(images)
    backbone = ModuleBackbone(model, layers=(0, 1, 3, 4), **FACTS)  # made while the model is in training mode
    assert backbone.num_blocks == len(backbone.blocks) == 4
    with pytest.raises(TapError, match=r"tapped layers \[0, 1, 3\] did not run.*LayerDrop: use eval mode"):
        backbone(images)
    with torch.no_grad():
        features = backbone.eval()(images)
    torch.testing.assert_close(list(features), [expected[i][:, 1:] for i in (0, 1, 3, 4)], rtol=0, atol=0)


# Patches that are dropped, masked or merged: what is left lies on no grid.


@pytest.mark.parametrize(
    "rate", [0.1, 0.5]
)  # of nine patches one, so that with the class token nine tokens are left; or five
@pytest.mark.parametrize(
    ("family", "build"),
    [
        (TimmBackbone, lambda rate: timm_model("vit_small_patch16_224", img_size=EDGE, patch_drop_rate=rate)),
        (TimmBackbone, lambda rate: timm_model("eva02_base_patch16_clip_224", img_size=EDGE, patch_drop_rate=rate)),
        (TimmBackbone, lambda rate: timm_model("vit_small_patch16_dinov3", img_size=EDGE, patch_drop_rate=rate)),
        (TimmBackbone, lambda rate: timm_model("naflexvit_base_patch16_gap", patch_drop_rate=rate)),
        (OpenClipBackbone, lambda rate: open_clip_native(patch_dropout=rate, patch_size=16, image_size=EDGE)),
        (
            OpenClipBackbone,
            lambda rate: open_clip_timm(timm_model("vit_small_patch16_224", img_size=EDGE, patch_drop_rate=rate)),
        ),
    ],
    ids=["timm-vit", "timm-eva", "timm-dinov3", "timm-naflex", "open_clip", "open_clip-timm"],
)
def test_patch_dropout_is_named_in_training_and_absent_in_evaluation(
    family: Callable[..., Backbone], build: Callable[[float], Callable[[], nn.Module]], rate: float
) -> None:
    images = random_images(2, size=EDGE)
    with_dropout, without = (family(build(each)(), layers=(0, 2)) for each in (rate, 0.0))
    with_dropout.load_state_dict(without.state_dict())
    with pytest.raises(TapError, match="patch dropout, which eval mode or a rate of 0 turns off"):
        with_dropout.train()(images)
    with torch.no_grad():
        torch.testing.assert_close(list(with_dropout.eval()(images)), list(without.eval()(images)), rtol=0, atol=0)
    with_dropout.freeze()
    with_dropout.train()
    with torch.no_grad():
        assert len(with_dropout(images)) == 2


def test_masked_pretraining_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"ViT-MAE shuffles its patches.*ViTModel.from_pretrained.*_224\.mae"):
        TransformersBackbone(hugging_face("vit_mae", patch_size=16, mask_ratio=0.0)(), layers=1)
    assert "vit_base_patch16_224.mae" in timm.list_pretrained("vit_base_patch16_224.*")
    model = hugging_face("vit_mae", patch_size=16)()
    facts = {**FACTS, "embed_dim": 32}
    backbone = ModuleBackbone(model, layers=1, blocks="layers", **facts)
    with pytest.raises(TapError, match=r"Tokens were dropped.*masked pretraining \(MAE"):
        backbone(random_images(2, size=EDGE))


def test_merged_tokens_are_refused_by_name_and_layers_before_them_are_right() -> None:
    class MergingBlock(Block):
        """Averages pairs of the last four patches, as token merging (ToMe) does with the most similar ones."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            merged = (x[:, -4:-2] + x[:, -2:]) / 2
            return torch.cat([x[:, :-4], merged], dim=1)

    model = vit(nn.ModuleList([Block(), MergingBlock(), Block()]))
    images = random_images(2, size=EDGE)
    expected = own_layers(model, images)[1]
    backbone = ModuleBackbone(model, layers=(1, 3), blocks="blocks", **FACTS)
    with pytest.raises(TapError, match=r"layer 3 .*\(2, 8, 16\).*Tokens were dropped.*merging or pruning"):
        backbone(images)
    backbone = ModuleBackbone(model, layers=1, blocks="blocks", **FACTS)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).maps[0], expected[:, 1:], rtol=0, atol=0)


# Chunks: DINOv2's block_chunks.


def test_chunks_of_blocks_are_refused_by_name_with_what_to_do() -> None:
    model = vit(chunked(6, 2))
    for act in (lambda: tap(model, 1), lambda: ModuleBackbone(model, layers=1, **FACTS)):
        with pytest.raises(InputError, match=r"BlockChunk of several equal blocks.*block_chunks=0.*blocks='blocks\.0'"):
            act()
    with pytest.raises(InputError, match=r"the first 3 entries of 'blocks\.1' stand for blocks of earlier chunks"):
        tap(model, 4, blocks="blocks.1")
    images = random_images(2, size=EDGE)
    expected = own_layers(model, images)
    with torch.no_grad(), tap(model, (0, 1, 3), blocks="blocks.0") as tapped:
        model(images)
    torch.testing.assert_close(tapped.hidden_states, (expected[0], expected[1], expected[3]), rtol=0, atol=0)


def test_chunks_that_something_is_wrapped_around_are_refused_too() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for wrap in (checkpoint_wrapper, lambda chunk: torch.compile(chunk, backend="eager")):
        model = vit(chunked(6, 2))
        model.blocks = nn.ModuleList(wrap(chunk) for chunk in model.blocks)
        with pytest.raises(InputError, match=r"several equal blocks.*block_chunks=0"):
            tap(model, 1, blocks="blocks")


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of one process, in which nothing is sent."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_sharded_chunks_are_refused_and_sharded_blocks_are_not(process_group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def shard(module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"))

    model = vit(chunked(6, 2))
    model.blocks = nn.ModuleList(shard(chunk) for chunk in model.blocks)
    with pytest.raises(InputError, match=r"several equal blocks.*block_chunks=0"):
        tap(model, 1, blocks="blocks")
    model = vit(nn.ModuleList(nn.Sequential(Block(), nn.Sequential(nn.Linear(WIDTH, WIDTH))) for _ in range(2)))
    model.blocks = nn.ModuleList(shard(block) for block in model.blocks)
    assert tap(model, -1, blocks="blocks").layers == (2,)


def test_chunks_of_one_block_each_are_blocks_and_weights_of_chunks_load_into_a_flat_list() -> None:
    ones, flat = vit(chunked(4, 4)), vit(nn.ModuleList(Block() for _ in range(4)))
    images = random_images(2, size=EDGE)
    expected = own_layers(ones, images)
    state = {
        ".".join([*parts[:1], *parts[2:]]) if (parts := key.split("."))[0] == "blocks" else key: weight
        for key, weight in ones.state_dict().items()
    }
    flat.load_state_dict(state, strict=True)
    for model in (ones, flat):
        backbone = ModuleBackbone(model, layers=(0, 1, 2, 3, 4), **FACTS)
        assert backbone.num_blocks == 4
        with torch.no_grad():
            features = backbone(images)
        torch.testing.assert_close(list(features), [states[:, 1:] for states in expected], rtol=0, atol=0)
