"""Layer numbering, and tapping the blocks of a Vision Transformer with forward hooks.

Layers are numbered as in Hugging Face ``hidden_states``: 0 is the embedding output that enters block 1, ``k`` the
output of block ``k`` before any final norm; negative numbers count from the end (-1 = last block, -2 = penultimate).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import TracebackType
from typing import SupportsIndex

import torch
from torch import nn

from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.features import FeatureMaps, Grid

__all__ = ["BlockTaps", "TappedModel", "find_blocks", "get_blocks", "resolve_layers", "split_prefix", "tap"]


def resolve_layers(layers: SupportsIndex | Sequence[SupportsIndex], num_blocks: int) -> tuple[int, ...]:
    """Turn layer numbers, counted from either end, into numbers >= 0, in the order asked.

    Args:
        layers: one layer number or several. 0 = embeddings, 1..num_blocks = block outputs, negatives count from the
            end, so that (-22, -17, -12, -7, -2) is (3, 8, 13, 18, 23) on a 24-block ViT.
        num_blocks: number of blocks of the whole backbone.

    Returns:
        The layer numbers, each 0..num_blocks, in the order asked.

    Raises:
        ValueError: if no layer is given, one is out of range, or one is asked for twice.
        TypeError: if a layer is not an integer.
    """
    if isinstance(layers, str):
        raise InvalidTypeError(f"layers must be integers, got the text {layers!r}; write for example (3, 8, -2).")
    asked = tuple(layers) if isinstance(layers, Sequence) else (layers,)
    if not asked:
        raise InputError("no layer was asked for; give at least one, for example layers=-2 (the penultimate block).")
    resolved: dict[int, SupportsIndex] = {}
    for given in asked:
        if isinstance(given, bool) or not hasattr(given, "__index__"):
            raise InvalidTypeError(f"layers must be integers, got {given!r}; write for example (3, 8, -2).")
        number = operator.index(given)
        layer = number + num_blocks + 1 if number < 0 else number
        if not 0 <= layer <= num_blocks:
            raise InputError(
                f"layer {number} is outside this backbone ({num_blocks} blocks: 0 = embeddings, 1..{num_blocks}, "
                f"or -{num_blocks + 1}..-1)."
            )
        if layer in resolved:
            twice = f"{resolved[layer]} and {number}" if resolved[layer] != number else f"{number} twice"
            raise InputError(
                f"layers {asked} ask for the same map more than once ({twice}; {num_blocks} blocks); name each once."
            )
        resolved[layer] = number
    return tuple(resolved)


def get_blocks(model: nn.Module, path: str) -> nn.Module:
    """Return the block list at a dotted path.

    Args:
        model: any module.
        path: such as ``"encoder.layers"``.

    Returns:
        The ``nn.ModuleList`` or ``nn.Sequential`` there.

    Raises:
        ValueError: if there is no block list at that path; the message lists the ones found.
    """
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        found = ", ".join(_block_list_paths(model)) or "none"
        raise InputError(
            f"{type(model).__name__} has no block list at {path!r}; expected the path of an nn.ModuleList or "
            f"nn.Sequential of blocks. Found: {found}."
        )
    return blocks


def find_blocks(model: nn.Module) -> str:
    """Find the one block list of a model by its structure.

    Args:
        model: a module with one ``nn.ModuleList`` or ``nn.Sequential`` of two or more blocks of one class.

    Returns:
        Its dotted path.

    Raises:
        ValueError: if there is none, or more than one; the message lists them.
    """
    paths = _block_list_paths(model)
    if len(paths) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(paths)} block lists ({', '.join(paths) or 'none'}); "
            "say which one to tap by its path, for example blocks='encoder.layers'."
        )
    return paths[0]


def _block_list_paths(model: nn.Module) -> list[str]:
    paths: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in paths):
            continue
        children = list(module.children())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        weighted = alike and next(children[0].parameters(), None) is not None
        if path and isinstance(module, (nn.ModuleList, nn.Sequential)) and weighted:
            paths.append(path)
    return paths


def split_prefix(hidden: torch.Tensor, num_prefix_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a block's output into prefix and patch tokens, as views.

    Args:
        hidden: (B, P + N, C).
        num_prefix_tokens: P.

    Returns:
        (B, P, C) prefix tokens and (B, N, C) patch tokens.
    """
    return hidden[:, :num_prefix_tokens], hidden[:, num_prefix_tokens:]


class _StopForwardError(BaseException):
    """Leaves a forward pass after the deepest tapped block; a BaseException so that no model code catches it."""


# Hooks are instances rather than closures, so that copy.deepcopy of a tapped model rebinds them to the copy's store.
class _StoreInput:
    def __init__(self, taps: BlockTaps) -> None:
        self.taps = taps

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        self.taps._store(0, args[0] if args else kwargs["hidden_states"])


class _StoreOutput:
    def __init__(self, taps: BlockTaps, layer: int) -> None:
        self.taps = taps
        self.layer = layer

    def __call__(self, module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self.taps._store(self.layer, output if isinstance(output, torch.Tensor) else output[0])


class BlockTaps:
    """Forward hooks that store what the tapped layers of a block list put out.

    A hook overwrites and never appends, and stores only between ``start()`` and ``collect()``, so that blocks that run
    twice (gradient checkpointing) leave nothing behind.

    Args:
        blocks: the block list; every block takes the hidden states (B, P + N, C) first and returns them, or a tuple
            that begins with them.
        layers: resolved layer numbers, 0..len(blocks), in the order wanted.
        stop_early: leave the forward pass after the deepest tapped block; only `tap` can catch that.
    """

    def __init__(self, blocks: nn.Module, layers: Sequence[int], *, stop_early: bool = False) -> None:
        self.layers = tuple(layers)
        self.stop_early = stop_early
        self._deepest = max(self.layers)
        self._outputs: dict[int, torch.Tensor] = {}
        self._recording = False
        modules = list(blocks.children())
        self._handles = [
            modules[0].register_forward_pre_hook(_StoreInput(self), with_kwargs=True)
            if layer == 0
            else modules[layer - 1].register_forward_hook(_StoreOutput(self, layer))
            for layer in self.layers
        ]

    def start(self) -> None:
        """Forget what was stored and begin to store."""
        self._outputs.clear()
        self._recording = True

    def collect(self) -> tuple[torch.Tensor, ...]:
        """Stop storing, and hand over what was stored.

        Returns:
            One tensor (B, P + N, C) per layer, in the order asked.

        Raises:
            RuntimeError: if a tapped block did not run since ``start()``.
        """
        self._recording = False
        missing = [layer for layer in self.layers if layer not in self._outputs]
        if missing:
            raise RuntimeError(
                f"tapped layers {missing} did not run; asked for {self.layers}. Run the model once, through its "
                "forward, after the taps were set."
            )
        outputs = tuple(self._outputs[layer] for layer in self.layers)
        self._outputs.clear()
        return outputs

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _store(self, layer: int, hidden: torch.Tensor) -> None:
        if not self._recording:
            return
        self._outputs[layer] = hidden
        if self.stop_early and layer == self._deepest:
            raise _StopForwardError


class TappedModel:
    """What `tap` returns: a context in which the model's blocks are tapped.

    Attributes:
        layers: the resolved layer numbers, in the order asked.
        hidden_states: after the block, one tensor (B, P + N, C) per layer, in the order asked.
    """

    def __init__(self, model: nn.Module, layers: tuple[int, ...], blocks: nn.Module, *, stop_early: bool) -> None:
        self.model = model
        self.layers = layers
        self.hidden_states: tuple[torch.Tensor, ...] = ()
        self._blocks = blocks
        self._stop_early = stop_early
        self._taps: BlockTaps | None = None

    def __enter__(self) -> TappedModel:
        """Put the hooks on the model."""
        if self._taps is not None:
            raise RuntimeError("this model is tapped already; leave the first 'with' block, or call tap() again.")
        self._taps = BlockTaps(self._blocks, self.layers, stop_early=self._stop_early)
        self._taps.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Take the hooks off, whatever happened."""
        assert self._taps is not None
        taps, self._taps = self._taps, None
        taps.remove()
        stopped = kind is not None and issubclass(kind, _StopForwardError)
        if kind is None or stopped:
            self.hidden_states = taps.collect()
        return stopped

    def features(self, *, grid: Grid, num_prefix_tokens: int) -> FeatureMaps:
        """Wrap what was tapped as feature maps.

        Args:
            grid: (H, W) of the patch tokens, in patches.
            num_prefix_tokens: P, tokens before the patch tokens (class token, registers).

        Returns:
            L maps, each (B, H * W, C).

        Raises:
            ValueError: if grid and prefix tokens do not add up to the number of tokens.
        """
        pairs = [split_prefix(hidden, num_prefix_tokens) for hidden in self.hidden_states]
        return FeatureMaps(
            maps=tuple(patches for _, patches in pairs),
            layers=self.layers,
            grids=(grid,) * len(pairs),
            prefix=tuple(prefix for prefix, _ in pairs) if num_prefix_tokens else (),
        )


def tap(
    model: nn.Module,
    layers: int | Sequence[int],
    *,
    blocks: str | None = None,
    stop_early: bool = False,
) -> TappedModel:
    """Tap layers of a model that you hold, and leave it as it was found.

    Run the model once inside the ``with`` block, in whatever way it is called::

        with layerfuse.tap(model, layers=(3, 8, -2), stop_early=True) as tapped:
            model(images)
        features = tapped.features(grid=(24, 24), num_prefix_tokens=1)

    Args:
        model: any module with a list of blocks.
        layers: layer numbers, see `resolve_layers`.
        blocks: dotted path of the block list; found by structure if there is just one.
        stop_early: do not run what comes after the deepest tapped block; this also leaves the ``with`` block there,
            so make the model's call the last line in it.

    Returns:
        A context manager; ``hidden_states`` and ``features()`` are there after the ``with`` block.

    Raises:
        ValueError: if the block list is not found, or a layer is out of range or repeated.
    """
    block_list = get_blocks(model, blocks if blocks is not None else find_blocks(model))
    resolved = resolve_layers(layers, len(list(block_list.children())))
    return TappedModel(model, resolved, block_list, stop_early=stop_early)
