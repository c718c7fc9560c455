"""Tapping the blocks of a Vision Transformer with forward hooks; layers are numbered as in `layerfuse.layers`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from layerfuse._block_lists import (
    find_blocks,
    first_argument,
    first_parameter,
    get_blocks,
)
from layerfuse._block_stages import Blocks
from layerfuse._tapped_layers import (
    TappedLayer,
    check_gradients,
    check_passed_on,
    check_runs,
    check_unchanged,
    record_layer,
)
from layerfuse.errors import TapError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.layers import LayerChoice, resolve_layers

__all__ = [
    "BlockTaps",
    "TappedModel",
    "as_features",
    "find_blocks",
    "get_blocks",
    "resolve_layers",
    "split_prefix",
    "tap",
]


def split_prefix(hidden: torch.Tensor, num_prefix_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split hidden states (B, P + N, C) into prefix tokens (B, P, C) and patch tokens (B, N, C), as views."""
    return hidden[:, :num_prefix_tokens], hidden[:, num_prefix_tokens:]


def as_features(
    hidden_states: Sequence[torch.Tensor], layers: tuple[int, ...], *, grids: Sequence[Grid], num_prefix_tokens: int
) -> FeatureMaps:
    """Return feature maps made of the hidden states (B, P + N, C) of L layers: maps (B, N, C), and prefix (B, P, C).

    Raises:
        ValueError: if grid and prefix tokens do not add up to the number of tokens.
    """
    pairs = [split_prefix(hidden, num_prefix_tokens) for hidden in hidden_states]
    return FeatureMaps(
        maps=tuple(patches for _, patches in pairs),
        layers=layers,
        grids=tuple(grids),
        prefix=tuple(prefix for prefix, _ in pairs) if num_prefix_tokens else (),
    )


class _StopForwardError(BaseException):
    """Leaves a forward pass after the deepest tapped block; a BaseException so that no model code catches it."""


class _Call:
    """The store of one run of a tapped model, which its hooks fill and nobody else's."""

    def __init__(self, taps: BlockTaps, *, copy_maps: bool) -> None:
        self.taps = taps
        self.copy_maps = copy_maps
        self.grad = torch.is_grad_enabled()
        self.stored: dict[int, TappedLayer] = {}
        self.repeated: set[int] = set()
        self.settled: set[int] = set()


class _ThreadCalls(threading.local):
    """The calls that are under way in a thread, outermost first.

    A thread-local rather than a context variable: torch.compile traces it without a graph break, and a store that only
    one thread can see needs no lock and survives deepcopy, pickling and replication of the model, which know nothing
    of it.
    """

    def __init__(self) -> None:
        self.calls: tuple[_Call, ...] = ()


_THREAD = _ThreadCalls()
# RemovableHandle hands out its ids without a lock, so two threads could get one id and lose a hook.
_REGISTRATION = threading.Lock()


# Hooks are instances rather than closures, so that copy.deepcopy of a tapped model rebinds them to the copy's taps.
class _EntranceHook:
    """A hook before a block: stores layer 0, or checks that the block receives the output of the one before it."""

    def __init__(self, taps: BlockTaps, layer: int, block: nn.Module) -> None:
        self.taps = taps
        self.layer = layer
        self.keyword = first_parameter(block)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        # torch notes that a hook takes kwargs after it has registered it, so another thread may run it without them.
        call = self.taps._current()
        if call is None:
            return
        kwargs = kwargs or {}
        if self.layer == 0:
            _refuse_hooks_behind(self, 0, module._forward_pre_hooks)
            self.taps._store(call, 0, first_argument(args, kwargs, self.keyword), module, args)
        elif self.layer in call.stored and self.layer not in call.settled and not torch.compiler.is_compiling():
            call.settled.add(self.layer)
            tapped = call.stored[self.layer]
            check_passed_on(self.layer, tapped, (*args, *kwargs.values()))
            if not call.grad:
                # The original of a copy has served; held to the end of the call, its memory would not be used again.
                call.stored[self.layer] = tapped._replace(seen=tapped.kept)


class _ExitHook:
    """A hook behind a block that stores its output."""

    def __init__(self, taps: BlockTaps, layer: int) -> None:
        self.taps = taps
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.taps._current()
        if call is not None:
            if self.layer in self.taps.layers:
                _refuse_hooks_behind(self, self.layer, module._forward_hooks)
            self.taps._store(call, self.layer, output, module, args)


def _refuse_hooks_behind(ours: _EntranceHook | _ExitHook, layer: int, hooks: dict[int, Any]) -> None:
    """Refuse to tap before a hook of somebody else's, which may yet replace the tensor."""
    # A list first: another thread may add hooks of its own while this one looks.
    for hook in reversed(list(hooks.values())):
        if hook is ours:
            return
        if not isinstance(hook, (_EntranceHook, _ExitHook)):
            raise TapError(
                f"a hook was added at layer {layer} after the taps were set, and would run behind them, so what it "
                "changes would not be seen. Add hooks before layerfuse.tap; before a backbone with such hooks is "
                "compiled or exported, call it once, which moves the taps behind them."
            )


class BlockTaps:
    """Forward hooks that store what the tapped layers of a block list put out, in the call that runs them.

    The taps themselves keep nothing: each call has a store of its own, found by the thread that runs it, and emptied
    however the call ends. Blocks that run outside a call (recomputed in a backward pass, or run by somebody else) store
    nothing.

    Args:
        blocks: in order; every block takes the hidden states (B, P + N, C) first and returns them, or a tuple that
            begins with them.
        layers: resolved layer numbers, 0..len(blocks), in the order wanted.
        borders: layers between which and the next block the model may do something, since a stage ends there.
        stop_early: leave the forward pass after the deepest tapped block; only `tap` can catch that.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        layers: Sequence[int],
        *,
        borders: Collection[int] = (),
        stop_early: bool = False,
    ) -> None:
        self.layers = tuple(layers)
        self.stop_early = stop_early
        self._deepest = max(self.layers)
        # The layer before the deepest is watched even if nobody wants it: where one block does not receive what the
        # one before it put out (a residual sum outside the blocks), no entry of the list is a block. At the border of
        # a stage nothing can be told, so it is the last one before that.
        watched = set(self.layers)
        watched |= set([layer for layer in range(1, self._deepest) if layer not in borders][-1:])
        modules = list(blocks)
        with _REGISTRATION:
            self._handles = [
                modules[layer - 1].register_forward_hook(_ExitHook(self, layer)) for layer in watched if layer > 0
            ]
            self._handles += [
                modules[layer].register_forward_pre_hook(_EntranceHook(self, layer, modules[layer]), with_kwargs=True)
                for layer in watched
                if layer < len(modules) and layer not in borders
            ]

    def run(self, forward: Callable[..., object], *inputs: Any, copy_maps: bool = False) -> tuple[torch.Tensor, ...]:
        """Return the outputs (B, P + N, C) of the tapped layers, in the order asked, once a function has run the model.

        Raises:
            TapError: (a ValueError and a RuntimeError) if what the layers put out cannot be told for certain.
        """
        self._move_to_the_end()
        call = self.begin(copy_maps=copy_maps)
        try:
            forward(*inputs)
            return self.collect(call)
        finally:
            self.end(call)

    def begin(self, *, copy_maps: bool = False) -> _Call:
        """Open a call in this thread; whoever opens it must `end` it."""
        call = _Call(self, copy_maps=copy_maps)
        _THREAD.calls = (*_THREAD.calls, call)
        return call

    def collect(self, call: _Call) -> tuple[torch.Tensor, ...]:
        """Return the outputs that a call stored, if they are certain; see `run`."""
        check_runs(self.layers, call.stored, call.repeated)
        tapped = {layer: call.stored[layer] for layer in self.layers}
        check_unchanged(tapped)
        check_gradients(tapped)
        return tuple(record.kept for record in tapped.values())

    def end(self, call: _Call) -> None:
        """Close a call, whatever happened, and let go of its tensors."""
        _THREAD.calls = tuple(other for other in _THREAD.calls if other is not call)
        call.stored.clear()

    def remove(self) -> None:
        """Take the hooks off the model."""
        with _REGISTRATION:
            for handle in self._handles:
                handle.remove()

    def _current(self) -> _Call | None:
        for call in reversed(_THREAD.calls):
            if call.taps is self:
                return call
        return None

    def _move_to_the_end(self) -> None:
        # A hook that the user added after ours may change what a block takes or gives; ours must see the result.
        if torch.compiler.is_compiling():
            return
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            if hooks and handle.id in hooks and list(hooks)[-1] != handle.id:
                with _REGISTRATION:
                    # Not OrderedDict.move_to_end: torch 2.11 compiles hooks by the order of the dict beneath, which
                    # that leaves as it was.
                    hooks[handle.id] = hooks.pop(handle.id)

    def _store(self, call: _Call, layer: int, value: Any, module: nn.Module, args: tuple[Any, ...]) -> None:
        if layer in call.stored:
            call.repeated.add(layer)
            call.settled.add(layer)
            return
        call.stored[layer] = record_layer(
            layer, value, module, args, copied=call.copy_maps, wanted=layer in self.layers, grad_at_start=call.grad
        )
        if self.stop_early and layer == self._deepest:
            raise _StopForwardError


class TappedModel:
    """A context in which the blocks of a model are tapped; `tap` makes it.

    Attributes:
        layers: the resolved layer numbers, in the order asked.
        hidden_states: after the block, one tensor (B, P + N, C) per layer, in the order asked.
    """

    def __init__(
        self, model: nn.Module, layers: tuple[int, ...], blocks: Blocks, *, stop_early: bool, copy_maps: bool
    ) -> None:
        self.model = model
        self.layers = layers
        self.hidden_states: tuple[torch.Tensor, ...] = ()
        self._blocks = blocks
        self._stop_early = stop_early
        self._copy_maps = copy_maps
        self._call: _Call | None = None

    def __enter__(self) -> TappedModel:
        if self._call is not None:
            raise TapError("this model is tapped already; leave the first 'with' block, or call tap() again.")
        blocks, borders = self._blocks.modules, self._blocks.borders
        taps = BlockTaps(blocks, self.layers, borders=borders, stop_early=self._stop_early)
        self._call = taps.begin(copy_maps=self._copy_maps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._call is not None
        call, self._call = self._call, None
        stopped = kind is not None and issubclass(kind, _StopForwardError)
        try:
            if kind is None or stopped:
                self.hidden_states = call.taps.collect(call)
        finally:
            call.taps.end(call)
            call.taps.remove()
        return stopped

    def features(self, *, grid: Grid, num_prefix_tokens: int) -> FeatureMaps:
        """Return the tapped tensors as L feature maps (B, H * W, C) on a grid (H, W), in patches; prefix tokens apart.

        Raises:
            ValueError: if grid and prefix tokens do not add up to the number of tokens.
        """
        grids = (grid,) * len(self.hidden_states)
        return as_features(self.hidden_states, self.layers, grids=grids, num_prefix_tokens=num_prefix_tokens)


def tap(
    model: nn.Module,
    layers: LayerChoice,
    *,
    blocks: str | None = None,
    stop_early: bool = False,
    copy_maps: bool = False,
) -> TappedModel:
    """Tap layers of a model that you hold, and leave it as it was found.

    Run the model once inside the ``with`` block, in whatever way it is called::

        with layerfuse.tap(model, layers=(3, 8, -2), stop_early=True) as tapped:
            model(images)
        features = tapped.features(grid=(24, 24), num_prefix_tokens=1)

    Args:
        model: any module with a list of blocks.
        layers: layer numbers or shares of the depth, see `resolve_layers`.
        blocks: dotted path of the block list, found by structure if there is just one; of the lists of several
            stages with ``*`` for the number of a stage, ``"layers.*.blocks"``. Left out, a list of stages counts as
            the blocks.
        stop_early: do not run what comes after the deepest tapped block; this also leaves the ``with`` block there,
            so make the model's call the last line in it.
        copy_maps: copy each tensor when it is tapped, for a model that changes its hidden states in place; without it
            such a change is an error.

    Returns:
        A context manager; ``hidden_states`` and ``features()`` are there after the ``with`` block.

    Raises:
        ValueError: if the block list is not found, or a layer is out of range or repeated.
    """
    found = Blocks(model, blocks if blocks is not None else find_blocks(model))
    resolved = resolve_layers(layers, len(found))
    found.check_depth(max(resolved))
    return TappedModel(model, resolved, found, stop_early=stop_early, copy_maps=copy_maps)
