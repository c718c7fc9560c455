"""One store per call: threads, replicas, failures, recomputation and copies give what a sequential run gives."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerfuse import FusedEncoder, create_fuser, tap
from layerfuse.backbones import Backbone
from layerfuse.errors import TapError
from layerfuse.taps import BlockTaps
from layerfuse.testing import random_images, tiny_backbone
from tests.tap_support import Block, Chain, tensors_alive, tokens

IMAGES = [random_images(2, seed=seed) for seed in range(8)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("timm", layers=(0, 1, -1)).eval()


@pytest.fixture(scope="module")
def expected(backbone: Backbone) -> list[list[torch.Tensor]]:
    with torch.no_grad():
        return [[feature_map.clone() for feature_map in backbone(images)] for images in IMAGES]


@pytest.fixture
def eager_switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], None], *, count: int = 8, times: int = 40) -> None:
    """Call ``work`` with the numbers of images, from several threads at once; a failure in one fails the test."""
    failures: list[BaseException] = []

    def run(thread: int) -> None:
        try:
            for turn in range(times):
                work((thread * 3 + turn) % len(IMAGES))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def assert_same(maps: object, reference: list[torch.Tensor]) -> None:
    torch.testing.assert_close(list(maps), reference, rtol=0, atol=0)  # type: ignore[call-overload]


@pytest.mark.usefixtures("eager_switching")
def test_threads_on_one_backbone_get_the_maps_of_their_own_images(backbone, expected) -> None:
    def work(number: int) -> None:
        with torch.no_grad():
            assert_same(backbone(IMAGES[number]), expected[number])

    in_threads(work)


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("stop_early", [False, True])
def test_threads_that_tap_one_model_get_the_maps_of_their_own_images(backbone, expected, stop_early: bool) -> None:
    hooks = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in backbone.model.blocks]

    def work(number: int) -> None:
        with torch.no_grad(), tap(backbone.model, (0, 1, -1), stop_early=stop_early) as tapped:
            backbone.model(IMAGES[number])
        assert_same(tapped.features(grid=(4, 4), num_prefix_tokens=1), expected[number])

    in_threads(work)
    assert hooks == [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in backbone.model.blocks]


@pytest.mark.usefixtures("eager_switching")
def test_threads_that_train_evaluate_copy_and_fail_at_once_do_as_they_would_alone(backbone, expected) -> None:
    weight = backbone.model.blocks[0].attn.qkv.weight

    def gradient(number: int) -> torch.Tensor:
        return torch.autograd.grad(backbone(IMAGES[number]).maps[-1].square().sum(), weight)[0]

    gradients = [gradient(number) for number in range(len(IMAGES))]

    def work(number: int) -> None:
        torch.testing.assert_close(gradient(number), gradients[number])
        with torch.no_grad():
            assert_same(copy.deepcopy(backbone)(IMAGES[number]), expected[number])
            assert_same(pickle.loads(pickle.dumps(backbone))(IMAGES[number]), expected[number])
        with pytest.raises(ValueError, match="do not fit"):
            backbone(IMAGES[number][..., :16])

    in_threads(work, count=4, times=8)


@pytest.mark.usefixtures("eager_switching")
def test_threads_on_one_compiled_encoder_get_the_tokens_of_their_own_images(backbone) -> None:
    encoder = FusedEncoder(backbone, create_fuser("scalar_mix", in_channels=32, num_layers=3)).eval()
    with torch.no_grad():
        reference = [encoder(images) for images in IMAGES]
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        compiled(IMAGES[0])

    def work(number: int) -> None:
        with torch.no_grad():
            torch.testing.assert_close(compiled(IMAGES[number]), reference[number])

    in_threads(work, count=4, times=10)


def replicate(module: nn.Module) -> nn.Module:
    """Make a replica as torch.nn.DataParallel does: shallow copies whose parameters are plain attributes."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach())
    return replica


@pytest.mark.usefixtures("eager_switching")
def test_threads_with_replicas_of_data_parallel_get_the_maps_of_their_own_images() -> None:
    backbone = tiny_backbone("timm", layers=(0, 1, -1)).double().eval()
    replicas = {number: replicate(backbone) for number in range(len(IMAGES))}
    assert not list(replicas[0].parameters())
    with torch.no_grad():
        expected = [list(backbone(images)) for images in IMAGES]

    def work(number: int) -> None:
        with torch.no_grad():
            assert_same(replicas[number](IMAGES[number]), expected[number])

    in_threads(work, times=10)


def test_threads_inside_the_model_are_refused_because_their_blocks_are_not_seen() -> None:
    def elsewhere(model: Chain, hidden: torch.Tensor) -> torch.Tensor:
        results: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: results.append(model.blocks[0](hidden)))
        thread.start()
        thread.join()
        return results[0]

    model = Chain(run=elsewhere)
    with pytest.raises(TapError, match=r"layers \[1\] did not run.*another thread"), tap(model, 1):
        model(tokens())


def test_a_call_inside_a_call_has_its_own_store(backbone, expected) -> None:
    inner: list[list[torch.Tensor]] = []

    def run_again(*_: object) -> None:
        if not inner:
            inner.append([])
            inner[0] = list(backbone(IMAGES[3]))

    handle = backbone.model.blocks[1].register_forward_hook(run_again)
    with torch.no_grad():
        outer = backbone(IMAGES[5])
    handle.remove()
    assert_same(outer, expected[5])
    assert_same(inner[0], expected[3])


class FailsOnce(nn.Module):
    """A block that runs out of memory in its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.failed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.failed:
            self.failed = True
            raise RuntimeError("out of memory")
        return self.block(x)


def test_a_call_that_fails_keeps_nothing_and_the_next_one_is_right() -> None:
    model = Chain(nn.ModuleList([Block(), Block(), FailsOnce()]))
    taps = BlockTaps(model.blocks, (1, 3))
    inputs = tokens(batch_size=5)
    before = tensors_alive((5, 7, 4))  # other tests' tensors
    with pytest.raises(RuntimeError, match="out of memory"):
        taps.run(model, inputs)
    assert tensors_alive((5, 7, 4)) <= before
    copy.deepcopy(model)  # fails where a store holds tensors with a graph
    hidden = [model.embed(inputs)]
    for block in model.blocks:
        hidden.append(block(hidden[-1]))
    assert_same(taps.run(model, inputs), [hidden[1], hidden[3]])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_encoder_inside_a_checkpoint_gets_the_same_gradients_and_keeps_nothing(use_reentrant: bool) -> None:
    encoder = FusedEncoder(
        tiny_backbone("timm", layers=(1, 2, 3)), create_fuser("scalar_mix", in_channels=32, num_layers=3)
    ).eval()
    images = random_images(5).requires_grad_()

    def gradients(run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        encoder.zero_grad()
        run().square().sum().backward()
        return [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]

    before = tensors_alive((5, 17, 32))  # other tests' tensors
    plain = gradients(lambda: encoder(images))
    torch.testing.assert_close(gradients(lambda: checkpoint(encoder, images, use_reentrant=use_reentrant)), plain)
    assert tensors_alive((5, 17, 32)) <= before
    copy.deepcopy(encoder)


def checkpointed(every: int, *, use_reentrant: bool) -> Callable[[Chain, torch.Tensor], torch.Tensor]:
    def run(model: Chain, hidden: torch.Tensor) -> torch.Tensor:
        blocks = list(model.blocks)
        for start in range(0, len(blocks), every):
            part = nn.Sequential(*blocks[start : start + every])
            hidden = checkpoint(part, hidden, use_reentrant=use_reentrant)
        return hidden

    return run


def gradients_of(run: Callable[[Chain, torch.Tensor], torch.Tensor] | None, *, copy_maps: bool) -> list[torch.Tensor]:
    model = Chain(run=run)
    hidden = BlockTaps(model.blocks, (0, 1, 3)).run(model, tokens(), copy_maps=copy_maps)
    sum(states.square().sum() for states in hidden).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("copy_maps", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_blocks_give_the_same_gradients(every: int, copy_maps: bool) -> None:
    run = checkpointed(every, use_reentrant=False)
    torch.testing.assert_close(gradients_of(run, copy_maps=copy_maps), gradients_of(None, copy_maps=False))


def test_reentrant_checkpoints_give_the_same_gradients_where_each_block_has_its_own() -> None:
    run = checkpointed(1, use_reentrant=True)
    torch.testing.assert_close(gradients_of(run, copy_maps=False), gradients_of(None, copy_maps=False))


@pytest.mark.parametrize(("every", "copy_maps"), [(2, False), (1, True), (2, True)])
def test_reentrant_checkpoints_in_which_maps_lose_their_graph_are_refused(every: int, copy_maps: bool) -> None:
    with pytest.raises(TapError, match=r"layers \[.*\] has no gradient, while the model goes on.*use_reentrant=False"):
        gradients_of(checkpointed(every, use_reentrant=True), copy_maps=copy_maps)


def test_maps_without_a_graph_before_the_first_trained_block_are_no_loss() -> None:
    model = Chain()
    model.requires_grad_(False)
    model.blocks[2].requires_grad_(True)
    hidden = BlockTaps(model.blocks, (0, 1, 3, 4)).run(model, tokens())
    assert [states.requires_grad for states in hidden] == [False, False, True, True]


def test_a_detached_layer_behind_one_with_a_graph_is_refused() -> None:
    class Detached(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    model = Chain(nn.ModuleList([Block(), Detached(), Block()]))
    with (
        pytest.raises(TapError, match=r"layers \[2\] has no gradient.*\(layers \[1\]\).*detached"),
        tap(model, (1, 2), blocks="blocks"),
    ):
        model(tokens())
    with torch.no_grad(), tap(model, (1, 2), blocks="blocks"):
        model(tokens())


def test_blocks_compiled_apart_with_graph_breaks_give_the_eager_maps() -> None:
    class Broken(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x

    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Chain(nn.ModuleList(Broken() for _ in range(2)))
            self.taps = BlockTaps(self.model.blocks, (0, 2))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.taps.run(self.model, x)

    tapped = Tapped()
    compiled = torch.compile(tapped, backend="aot_eager")
    for seed in (1, 2):
        torch.testing.assert_close(compiled(tokens(seed)), tapped(tokens(seed)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_compiled_encoder_gives_the_eager_tokens_in_every_grad_mode(mode) -> None:
    encoder = FusedEncoder(
        tiny_backbone("transformers", layers=(0, -1)), create_fuser("concat", in_channels=32, num_layers=2)
    ).eval()
    with mode():
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IMAGES[1]), encoder(IMAGES[1]))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_encoder_takes_any_batch_size(strict: bool) -> None:
    encoder = FusedEncoder(
        tiny_backbone("timm", layers=(0, -1)), create_fuser("concat", in_channels=32, num_layers=2)
    ).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(encoder, (IMAGES[0],), dynamic_shapes=({0: batch},), strict=strict).module()
    for batch_size in (3, 17):
        images = random_images(batch_size)
        torch.testing.assert_close(exported(images), encoder(images))


@pytest.mark.parametrize("copy_maps", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_copied_layer_lets_go_of_its_original_once_the_next_block_has_it(
    mode: type[torch.no_grad], copy_maps: bool
) -> None:
    alive: list[int] = []
    model = Chain()
    before = tensors_alive((13, 7, 4))  # other tests' tensors
    model.blocks[3].register_forward_hook(lambda *_: alive.append(tensors_alive((13, 7, 4)) - before))
    with mode(), tap(model, layers=(1, 2, 3), copy_maps=copy_maps):
        model(tokens(batch_size=13))
    # Three maps, the input of block 4 where map 3 is a copy of it, block 4's output.
    copied = copy_maps or mode is torch.inference_mode
    assert alive == [5 if copied else 4]
