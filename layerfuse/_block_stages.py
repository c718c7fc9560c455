"""The blocks of a model in the order in which they run: one list of them, or one in each of several stages.

A hierarchical model (Swin, Hiera) makes its maps smaller from stage to stage. Where every stage is a module with a list
of blocks, the path of the lists has a ``*`` for the number of the stage: ``"layers.*.blocks"``.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import nn

from layerfuse._block_lists import (
    BlockList,
    block_entries,
    count_blocks,
    cut_blocks,
    get_blocks,
    is_left,
    refuse_lost_depth,
)
from layerfuse.errors import InputError

__all__ = ["Blocks"]

# Stands on a list of stages that was cut: how many blocks each stage had.
_DEPTHS_MARK = "_layerfuse_stage_depths"
_STAGE = "*"


class Blocks:
    """The blocks of a model, found at a path; layers are counted by them across stages.

    Args:
        model: which holds them.
        path: dotted, of the one list, or of the lists of all stages with ``*`` for the number of a stage.

    Attributes:
        lists: the block list of each stage that is left.
        paths: of these lists.
        depths: how many blocks each stage had when the model was built.

    Raises:
        ValueError: if there are no such lists, or their entries are not one block each.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        outer, star, inner = path.partition(f".{_STAGE}.")
        self._stages = _get_stages(model, outer, path) if star else None
        numbers = range(1 if self._stages is None else len(self._stages))
        self.paths = [f"{outer}.{number}.{inner}" if star else path for number in numbers]
        self.lists: list[BlockList] = [get_blocks(model, each) for each in self.paths]
        built = tuple(map(count_blocks, self.lists))
        self.depths: tuple[int, ...] = getattr(self._stages, _DEPTHS_MARK, built)

    def __len__(self) -> int:
        """Count the blocks that the model was built with, by which layers are numbered."""
        return sum(self.depths)

    @property
    def modules(self) -> list[nn.Module]:
        """The blocks that are left, in order."""
        return [block for each in self.lists for block in block_entries(each)]

    @property
    def borders(self) -> frozenset[int]:
        """Layers that are the last of a stage with a list of its own: what follows may change them on the way."""
        return frozenset(accumulate(self.depths[:-1]))

    def hold(self, name: str) -> bool:
        """Tell whether a parameter or module of this name lies in a block."""
        return any(f"{name}.".startswith(f"{path}.") for path in self.paths)

    def weights(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the weights of a model by the first layer that they have a part in: of layer 0, then of each block.

        In a stage, what is registered behind its blocks leads to the next stage.
        """
        outside: dict[str, Any] = {}
        before: list[dict[str, Any]] = [{} for _ in range(len(self.lists) + 1)]
        seen: set[int] = set()
        prefix = self.path.partition(_STAGE)[0] if self._stages is not None else None
        for name, weight in model.state_dict().items():
            if prefix is None or not name.startswith(prefix):
                if not self.hold(name):
                    outside[name] = weight
                continue
            number = int(name[len(prefix) :].partition(".")[0])
            if self.hold(name):
                seen.add(number)
            else:
                before[number + (number in seen)][name] = weight
        found = [{**outside, **before[0]}]
        for number, blocks in enumerate(self.lists):
            own = [dict(block.state_dict()) for block in block_entries(blocks)]
            if number:
                own[0].update(before[number])
            found += own
        return found

    def in_last_stage(self, path: str, depth: int) -> str:
        """Return a path with the number of the stage in place of ``*`` in which the block of a depth stands."""
        return path.replace(_STAGE, str(self._stage_of(depth)))

    def check_depth(self, depth: int) -> None:
        """Raise InputError if an earlier backbone cut off the deepest layer that is wanted."""
        left = sum(map(len, self.lists)) if is_left(self.lists[0]) else 0
        if depth > left:
            refuse_lost_depth(depth, left, len(self))

    def cut(self, depth: int, *, tuples: bool = False) -> None:
        """Remove the blocks behind a depth, and the stages behind its own; the lists change in place.

        ``tuples``: the model takes what a block returns for a pair that begins with the hidden states.

        Raises:
            ValueError: as `check_depth`.
        """
        self.check_depth(depth)
        stage = self._stage_of(depth)
        if self._stages is not None:
            setattr(self._stages, _DEPTHS_MARK, self.depths)
            del self._stages[stage + 1 :]
            del self.lists[stage + 1 :], self.paths[stage + 1 :]
        cut_blocks(self.lists[stage], depth - sum(self.depths[:stage]), tuples=tuples)

    def _stage_of(self, depth: int) -> int:
        return next(number for number, end in enumerate(accumulate(self.depths)) if depth <= end)


def _get_stages(model: nn.Module, outer: str, path: str) -> nn.ModuleList | nn.Sequential:
    try:
        stages = model.get_submodule(outer)
    except AttributeError:
        stages = None
    if not isinstance(stages, (nn.ModuleList, nn.Sequential)) or len(stages) == 0:
        raise InputError(
            f"{type(model).__name__} has no stages at {outer!r}, so {path!r} names no block lists; expected the path "
            "of an nn.ModuleList or nn.Sequential of stages, '*' for the number of a stage, and the path of the "
            "blocks inside a stage, as in 'layers.*.blocks'."
        )
    return stages
