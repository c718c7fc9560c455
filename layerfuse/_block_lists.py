"""The list of blocks inside a model: where it is, what stands in it, and how much of it an earlier backbone left.

A layer number counts entries of this list, so an entry must be one block that runs once in a call; a list in which that
cannot be so (shared, chunked or paired blocks) is refused before anything is changed.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from layerfuse.errors import InputError

__all__ = [
    "BlockList",
    "block_entries",
    "count_blocks",
    "cut_blocks",
    "cut_submodules",
    "find_blocks",
    "first_argument",
    "first_parameter",
    "get_blocks",
    "is_left",
    "refuse_lost_depth",
]

BlockList = nn.ModuleList | nn.Sequential

# Where FSDP, checkpoint wrappers and torch.compile hold the module that they wrap.
_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# Stands on a list that was cut, so that whoever counts it later counts what the model had.
_DEPTH_MARK = "_layerfuse_num_blocks"


def get_blocks(model: nn.Module, path: str) -> BlockList:
    """Return the block list at a dotted path such as ``"encoder.layers"``; every entry of it is one block.

    Raises:
        ValueError: if there is no block list at that path (the message lists the ones found), or its entries are not
            one block each.
    """
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) == 0:
        found = ", ".join(_block_list_paths(model)) or "none"
        raise InputError(
            f"{type(model).__name__} has no block list at {path!r}; expected the path of an nn.ModuleList or "
            f"nn.Sequential of blocks. Found: {found}."
        )
    _refuse_what_is_no_block(path, block_entries(blocks))
    return blocks


def block_entries(blocks: BlockList) -> list[nn.Module]:
    """Return the entries of a list by their number: a list with LayerDrop leaves some out where it is iterated."""
    return [blocks[index] for index in range(len(blocks))]


def find_blocks(model: nn.Module) -> str:
    """Return the path of a model's one ``nn.ModuleList`` or ``nn.Sequential`` of two or more blocks of one class.

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


def count_blocks(blocks: BlockList) -> int:
    """Count the blocks that the model was built with, by which layers are numbered; `cut_blocks` does not change it."""
    return int(getattr(blocks, _DEPTH_MARK, len(blocks)))


def cut_blocks(blocks: BlockList, depth: int, *, tuples: bool = False) -> None:
    """Remove the blocks behind a depth from the list, in place: the parent may hold it under several names.

    Of depth 0, a block that does nothing stays for a place where layer 0 is tapped; ``tuples``: blocks return pairs.
    """
    setattr(blocks, _DEPTH_MARK, count_blocks(blocks))
    del blocks[max(depth, 1) :]
    if depth == 0 and is_left(blocks):
        blocks[0] = _NoBlock(first_parameter(blocks[0]), tuples=tuples)


def cut_submodules(model: nn.Module, paths: Sequence[str]) -> None:
    """Replace modules at dotted paths by ``nn.Identity``; InputError, and no change, if a path is not there."""
    for path in paths:
        try:
            model.get_submodule(path)
        except AttributeError as error:
            names = ", ".join(name for name, _ in model.named_children())
            raise InputError(
                f"{type(model).__name__} has no submodule {path!r} to cut off; its children: {names}."
            ) from error
    for path in paths:
        model.set_submodule(path, nn.Identity())


def is_left(blocks: BlockList) -> bool:
    """Tell whether block 1 of a list still stands where it stood, be the list cut or not."""
    return not isinstance(blocks[0], _NoBlock)


def refuse_lost_depth(depth: int, left: int, total: int) -> NoReturn:
    """Raise InputError for the deepest layer that is wanted, since an earlier backbone left fewer blocks."""
    raise InputError(
        f"layer {depth} is gone: a backbone that was made from this model before cut it after block {left} of "
        f"{total}. Build the model again (or copy.deepcopy it before the first backbone), or ask for layers 0..{left}."
    )


def first_parameter(block: nn.Module) -> str | None:
    """Tell the name of a block's first parameter, which takes the hidden states; None if it has none."""
    try:
        parameters = list(inspect.signature(block.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    named = parameters and parameters[0].kind in (parameters[0].POSITIONAL_OR_KEYWORD, parameters[0].KEYWORD_ONLY)
    return parameters[0].name if named else None


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], keyword: str | None) -> Any:
    """Return the hidden states among the arguments of a block whose first parameter is called ``keyword``.

    All keyword arguments are returned if none or several could be meant.
    """
    if args:
        return args[0]
    if keyword is not None and keyword in kwargs:
        return kwargs[keyword]
    tensors = [value for value in kwargs.values() if isinstance(value, torch.Tensor) and value.ndim == 3]
    return tensors[0] if len(tensors) == 1 else kwargs


class _NoBlock(nn.Module):
    """A block that does nothing, in the place of block 1 where only layer 0 is tapped: the hook stands before it."""

    def __init__(self, keyword: str | None, *, tuples: bool) -> None:
        super().__init__()
        self.tuples = tuples
        self.register_forward_pre_hook(partial(_pass_first_alone, keyword), with_kwargs=True)

    def forward(self, hidden_states: Any) -> Any:
        """Return the input, with a second value beside it where the model takes a block's output apart."""
        return (hidden_states, None) if self.tuples else hidden_states


def _pass_first_alone(
    keyword: str | None, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the hidden states as the only argument, without masks and rotary embeddings."""
    return (first_argument(args, kwargs, keyword),), {}


def _block_list_paths(model: nn.Module) -> list[str]:
    paths: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in paths)
        if path and not inside and isinstance(module, (nn.ModuleList, nn.Sequential)) and _looks_like_blocks(module):
            paths.append(path)
    return paths


def _looks_like_blocks(entries: BlockList) -> bool:
    if hasattr(entries, _DEPTH_MARK):
        return True
    alike = len(entries) > 1 and len({type(entry) for entry in entries}) == 1
    return alike and isinstance(entries[0], nn.Module) and next(entries[0].parameters(), None) is not None


def _refuse_what_is_no_block(path: str, entries: Sequence[nn.Module | None]) -> None:
    repeated = [type(entry).__name__ for entry, times in Counter(entries).items() if times > 1]
    if repeated:
        raise InputError(
            f"the block list {path!r} has {len(entries)} entries, but only {len(set(entries))} different modules "
            f"({', '.join(repeated)} in several places): a block that runs more than once in a call cannot be tapped, "
            "because its runs cannot be told apart. Give every entry its own module (copy.deepcopy of the shared one, "
            "or new blocks that share parameters)."
        )
    for number, entry in enumerate(entries, 1):
        if entry is None:
            raise InputError(f"entry {number} of the block list {path!r} is None; every entry must be a module.")
        if isinstance(entry, torch.jit.ScriptModule):
            raise InputError(
                f"entry {number} of the block list {path!r} was scripted, and scripted modules take no hooks; hand "
                "over the model that was not."
            )
        if getattr(entry.forward, "__func__", None) is nn.Module.forward:
            raise InputError(
                f"entry {number} of the block list {path!r} is an {type(entry).__name__} of "
                f"{', '.join(type(child).__name__ for child in entry.children()) or 'nothing'}, which never runs as a "
                "whole, so what it puts out cannot be tapped. Make a module of each block whose forward runs its "
                "parts, residual sums included."
            )
        if _is_chunk(entry):
            raise InputError(
                f"entry {number} of the block list {path!r} is a {type(entry).__name__} of several equal blocks, so "
                "layers would be counted in chunks rather than in blocks. Build the model with one flat list "
                "(DINOv2: block_chunks=0, and weights whose keys lose the number of the chunk, blocks.1.3.… becoming "
                f"blocks.3.…), or tap inside one chunk, for example blocks='{path}.{number - 1}'."
            )
    fillers = next((index for index, entry in enumerate(entries) if not isinstance(entry, nn.Identity)), 0)
    place = path.rpartition(".")[2]
    if fillers and place.isdigit() and place != "0":
        raise InputError(
            f"the first {fillers} entries of {path!r} stand for blocks of earlier chunks (nn.Identity, as in DINOv2 "
            "with block_chunks), so layers would be counted with blocks that are not in it. Tap inside the first "
            "chunk, or build the model with one flat list (DINOv2: block_chunks=0)."
        )


def _is_chunk(entry: nn.Module) -> bool:
    """Tell a stretch of equal blocks from a block whose parts are attention and MLP: these have other shapes."""
    for name in _WRAPPED:
        entry = getattr(entry, name, entry)
    if not isinstance(entry, (nn.ModuleList, nn.Sequential)):
        return False
    # Names tell, too: FSDP takes the parameters of what it wraps out of it.
    forms = [
        (
            [name for name, _ in part.named_modules()],
            [(name, tuple(weight.shape)) for name, weight in part.named_parameters()],
        )
        for part in block_entries(entry)
    ]
    parts = [form for form in forms if form != ([""], [])]
    return len(parts) > 1 and all(form == parts[0] for form in parts)
