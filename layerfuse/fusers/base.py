"""The base class of fusers, and the registry they are chosen from by name.

A fuser turns the feature maps of L layers into one set of visual tokens. It sees ``FeatureMaps`` and nothing of the
backbone. To write one, subclass ``Fuser``, decorate it with ``@FUSERS.register("name")`` and implement ``fuse``.
Packages announce theirs under the entry point group ``layerfuse.fusers``.
"""

from __future__ import annotations

import abc
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerfuse.argument_types import check_argument_types
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.registry import Registry, unknown_name_message

__all__ = ["FUSERS", "ExtraTokens", "Fuser", "FuserCost", "all_but"]

_F = TypeVar("_F", bound="Fuser")
_T = TypeVar("_T")
_SHARED = ("self", "in_channels", "num_layers")


class _FuserRegistry(Registry["Fuser"]):
    """A registry that also writes the name on the class, so that it is given once."""

    def register(self, name: str) -> Callable[[type[Fuser]], type[Fuser]]:
        """Return a class decorator that names a fuser and registers it."""
        register = super().register(name)

        def decorate(entry: type[Fuser]) -> type[Fuser]:
            registered = register(entry)
            registered.name = name
            return registered

        return decorate


FUSERS = _FuserRegistry("fuser", group="layerfuse.fusers")


@dataclass(frozen=True)
class FuserCost:
    """The cost of a fuser, known before anything is run or allocated.

    Args:
        parameters: how many there are.
        out_channels: C_out of the fused tokens.
        num_tokens: fused tokens per image.
        flops: per image, 2 * multiply-adds of matrix products and weighted sums; norms, softmax and element-wise work
            are left out, as is customary.
    """

    parameters: int
    out_channels: int
    num_tokens: int
    flops: int


class ExtraTokens(NamedTuple):
    """Numbers of fused tokens that belong to no cell of the grid, such as pooled or learned ones.

    Args:
        front: tokens before those of the grid.
        behind: tokens after them.
    """

    front: int = 0
    behind: int = 0


class Fuser(nn.Module, abc.ABC):
    """Base class of all fusers.

    A subclass's own constructor arguments, which are JSON-able, go into ``config`` as they are given. They are checked
    against their type hints before the constructor runs, see `layerfuse.argument_types`.

    Args:
        in_channels: C of every map, or one number per map.
        num_layers: number of maps L.
        out_channels: C_out; if left out, the width of the last map.
        options: deprecated; the constructor's arguments are noted without it.

    Attributes:
        name: what ``FUSERS.register`` wrote on the class.
        equal_grids: whether all maps must share one grid; set on the class, or by the constructor.
        equal_channels: whether all maps must share one width.
        unsaved_options: constructor arguments that say how to compute and not what; ``config`` leaves them out.
        condition_channels: D_c of the condition that the fuser needs, set on the class or in the constructor; None for
            a fuser that takes none.
        options: the subclass's own constructor arguments by name.

    Raises:
        ValueError: if an argument's type is not that of its hint, counts or widths are impossible, or widths differ
            where they must not.
    """

    name: ClassVar[str] = ""
    equal_grids: bool = True
    equal_channels: ClassVar[bool] = False
    unsaved_options: ClassVar[frozenset[str]] = frozenset()
    condition_channels: int | None = None
    options: dict[str, Any]

    def __new__(cls: type[_F], *args: Any, **kwargs: Any) -> _F:
        """Check the arguments and note the options; copies, which are made without them, bring their own."""
        fuser = super().__new__(cls)
        given = inspect.signature(cls.__init__).bind_partial(fuser, *args, **kwargs)
        given.apply_defaults()
        names, whose = cls.option_parameters(), f"fuser {cls.name or cls.__name__!r}"
        options = {name: value for name, value in given.arguments.items() if name in names}
        shared = {name: value for name, value in given.arguments.items() if name in _SHARED[1:]}
        # A subclass may say less of these two than it takes.
        check_argument_types(Fuser.__init__, shared, of=whose)
        check_argument_types(cls.__init__, options, of=whose)
        fuser.__dict__["options"] = options
        return fuser

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        out_channels: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._counted: dict[tuple[tuple[Grid, ...], int | None], int] = {}
        self.num_layers = num_layers
        self.in_channels = _widths(in_channels, num_layers)
        if self.equal_channels and len(set(self.in_channels)) > 1:
            raise InputError(
                f"fuser {self.name!r} got maps of widths {_listed(self.in_channels)}; it needs one width for all maps. "
                "Tap layers of one width, or use 'concat'."
            )
        self.out_channels = self.in_channels[-1] if out_channels is None else out_channels
        if options is not None:
            warnings.warn(
                f"{type(self).__name__} passes options to Fuser.__init__, which is deprecated; leave it out, since a "
                "constructor's arguments are noted without it.",
                DeprecationWarning,
                stacklevel=2,
            )
            self.options.update((name, options[name]) for name in self.options.keys() & options.keys())

    @classmethod
    def option_parameters(cls) -> dict[str, inspect.Parameter]:
        """Return the constructor's arguments beyond the two that all fusers share, by name."""
        if cls.__init__ is Fuser.__init__:
            return {}  # no constructor of its own, no options of its own
        parameters = inspect.signature(cls.__init__).parameters
        return {name: entry for name, entry in parameters.items() if name not in _SHARED}

    def forward(self, features: FeatureMaps, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Check feature maps and fuse them, in the precision of the fuser's parameters; others are converted to it.

        Args:
            features: L maps, each (B, N_l, C_l).
            condition: (B, D_c), such as an embedding of each image's question, for a fuser with ``condition_channels``.

        Returns:
            (B, N, C_out) fused tokens in the dtype of the maps: row-major over ``out_grid``, with ``extra_tokens`` in
            front and behind.

        Raises:
            ValueError: if number, widths or grids of the maps, or the condition, are not what the fuser was built for.
        """
        self._check_maps(features)
        self.check_condition(condition, features.batch_size)
        precision, given = self._dtype, features.maps[0].dtype
        mixed = precision != given or (condition is not None and condition.dtype != precision)
        # Under autocast, torch chooses the precision of each operation.
        if precision is None or not mixed or torch.is_autocast_enabled(features.maps[0].device.type):
            precision = given
        else:
            features, condition = features.to(precision), None if condition is None else condition.to(precision)
        # A fuser that takes no condition may leave it out of its signature.
        fused = self.fuse(features) if condition is None else self.fuse(features, condition=condition)
        return fused if precision == given else fused.to(given)

    @property
    def _dtype(self) -> torch.dtype | None:
        """The dtype of the first floating parameter, in which the fuser computes."""
        # `parameters()` would take about twice as long, in every call of the fuser.
        for module in self.modules():
            for weight in module._parameters.values():
                if weight is not None and weight.is_floating_point():
                    return weight.dtype
        return None

    @abc.abstractmethod
    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the fused tokens (B, N, C_out) of maps whose number, widths and grids have been checked.

        They are row-major over ``out_grid``, with ``extra_tokens`` in front and behind. ``condition``, (B, D_c), is
        checked, and passed only to a fuser with ``condition_channels``.
        """

    def out_grid(self, grids: Sequence[Grid]) -> Grid | None:
        """Return the grid (H, W) of the fused tokens: that of the last map, unless a fuser says otherwise.

        None if no token belongs to a cell. ``grids`` are those of the L maps, in patches, in each
        method that takes them.
        """
        return grids[-1]

    def extra_tokens(self, grids: Sequence[Grid]) -> ExtraTokens:
        """Return the numbers of fused tokens that belong to no cell of ``out_grid``: none, unless a fuser says so."""
        return ExtraTokens()

    def num_tokens(self, grids: Sequence[Grid]) -> int:
        """Return the number N of fused tokens per image: the cells of ``out_grid`` and ``extra_tokens``."""
        height, width = self.out_grid(grids) or (0, 0)
        return height * width + sum(self.extra_tokens(grids))

    def flops(self, grids: Sequence[Grid]) -> int:
        """Count floating point operations per image, as ``FuserCost.flops`` defines them.

        A fuser built from the same arguments runs on the meta device, where torch counts its matrix products;
        ``extra_flops`` are added. Each choice of grids is counted once.
        """
        asked = (tuple(grids), self.condition_channels)
        if asked not in self._counted:
            self._counted[asked] = self._count_products(grids)
        return self._counted[asked] + self.extra_flops(grids)

    def _count_products(self, grids: Sequence[Grid]) -> int:
        with torch.device("meta"), torch.no_grad():
            twin = type(self)(_uniform(self.in_channels), self.num_layers, **self.options).eval()
            sizes = zip(grids, self.in_channels, strict=True)
            maps = tuple(torch.empty(1, height * width, channels) for (height, width), channels in sizes)
            features = FeatureMaps(maps, layers=tuple(range(self.num_layers)), grids=tuple(grids)).to(twin._dtype)
            width = self.condition_channels
            condition = None if width is None else torch.empty(1, width, dtype=twin._dtype)
            with FlopCounterMode(display=False) as counter:
                twin(features, condition)
        return counter.get_total_flops()

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count the operations per image that torch does not: of weighted sums and lookups, 2 * multiply-adds."""
        return 0

    def cost(self, grids: Sequence[Grid]) -> FuserCost:
        """Return the cost of the fuser on maps of these grids; also of one built on the meta device.

        Raises:
            ValueError: if number or grids of the maps are not what the fuser was built for.
        """
        self._check_grids(grids)
        return FuserCost(
            parameters=sum(parameter.numel() for parameter in self.parameters()),
            out_channels=self.out_channels,
            num_tokens=self.num_tokens(grids),
            flops=self.flops(grids),
        )

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...] | None:
        """Return the layers that the fuser's source taps of a backbone of ``depth`` blocks, in the fuser's order.

        Layer 0 is the embeddings, ``depth`` the last block; None if none were published for this depth. A fuser whose
        options decide it may take those as keyword-only arguments, with their defaults.
        """
        return None

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able description from which ``fuser_from_config`` builds the same architecture."""
        options = {name: value for name, value in self.options.items() if name not in self.unsaved_options}
        # Lists, as JSON gives them back.
        saved = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {"name": self.name, "in_channels": _uniform(self.in_channels), "num_layers": self.num_layers, **saved}

    def reset_parameters(self) -> None:
        """Initialise all parameters as at construction; needed after building on the meta device.

        A fuser that gives its modules other numbers than they give themselves does so here, not in ``__init__``, which
        calls this method: see examples/write_a_fuser.py.
        """
        _reset_children(self)

    def extra_repr(self) -> str:
        """Return the config as text, for ``print(fuser)``."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config.items() if key != "name")

    def _check_maps(self, features: FeatureMaps) -> None:
        self._check_grids(features.grids)
        if features.channels != self.in_channels:
            raise InputError(
                f"fuser {self.name!r} got maps of widths {_listed(features.channels)}; it was built for "
                f"{_listed(self.in_channels)}. Build it with in_channels=[{_listed(features.channels)}]."
            )

    def _check_grids(self, grids: Sequence[Grid]) -> None:
        if len(grids) != self.num_layers:
            raise InputError(
                f"fuser {self.name!r} got {len(grids)} maps; it was built for num_layers={self.num_layers}. Tap "
                f"as many layers, or build it with num_layers={len(grids)}."
            )
        if self.equal_grids and len(set(grids)) > 1:
            raise InputError(
                f"fuser {self.name!r} got maps of grids {_listed(f'{height}x{width}' for height, width in grids)}; it "
                "needs one grid for all maps. Tap layers of one grid, or use a fuser that reads several: 'mmfuser', or "
                "'concat' with resize='bilinear'."
            )

    def _check_index(self, option: str, index: int) -> None:
        if not -self.num_layers <= index < self.num_layers:
            raise InputError(
                f"{option} {index} is outside the {self.num_layers} maps; allowed: "
                f"{-self.num_layers}..{self.num_layers - 1}."
            )

    @classmethod
    def _check_choice(cls, option: str, given: str, known: Iterable[str]) -> None:
        if given not in tuple(known):
            raise InputError(unknown_name_message(option, given, known, of=f"fuser {cls.name!r}"))

    def _check_count(self, option: str, count: int) -> None:
        if count < 1:
            raise InputError(f"{option} of fuser {self.name!r} is {count}; expected at least 1.")

    def _check_positive(self, option: str, number: float) -> None:
        if not (math.isfinite(number) and number > 0):
            raise InputError(
                f"{option} of fuser {self.name!r} is {number}; give a finite number above 0, such as 1e-6."
            )

    def check_condition(self, condition: torch.Tensor | None, batch_size: int) -> None:
        """Raise InputError or InvalidTypeError unless a condition is what the fuser reads for a batch of that size."""
        channels = self.condition_channels
        if channels is None:
            if condition is not None:
                raise InputError(f"fuser {self.name!r} takes no condition; call it with the feature maps alone.")
        elif condition is None:
            raise InputError(
                f"fuser {self.name!r} needs a condition, (B={batch_size}, D_c={channels}): call it with the feature "
                "maps and, say, an embedding of each image's question."
            )
        elif not isinstance(condition, torch.Tensor) or not condition.is_floating_point():
            kind = condition.dtype if isinstance(condition, torch.Tensor) else type(condition).__name__
            raise InputError(
                f"fuser {self.name!r} got a condition of type {kind}; it reads vectors of floating-point numbers, "
                f"(B={batch_size}, D_c={channels}): embed ids and names, and convert flags with .float()."
            )
        elif condition.shape != (batch_size, channels):
            raise InputError(
                f"fuser {self.name!r} got a condition of shape {tuple(condition.shape)}; it was built for "
                f"(B={batch_size}, D_c={channels}): give one vector per image."
            )


def all_but(items: Sequence[_T], index: int) -> list[_T]:
    """Return the items but the one at a position from 0 on."""
    return [*items[:index], *items[index + 1 :]]


def _uniform(widths: tuple[int, ...]) -> int | list[int]:
    """Return one number for all maps where they share it, as users write it."""
    return widths[0] if len(set(widths)) == 1 else list(widths)


def _widths(in_channels: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    if num_layers < 1:
        raise InputError(f"num_layers is {num_layers}; a fuser needs at least one map.")
    widths = (in_channels,) * num_layers if isinstance(in_channels, int) else tuple(in_channels)
    if len(widths) != num_layers:
        raise InputError(
            f"in_channels has {len(widths)} widths ({_listed(widths)}) for num_layers={num_layers}; give one number "
            "for all maps, or one per map."
        )
    if min(widths) < 1:
        raise InputError(f"in_channels is {_listed(widths)}; widths must be at least 1.")
    return widths


def _reset_children(module: nn.Module) -> None:
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            _reset_children(child)


def _listed(items: Any) -> str:
    return ", ".join(map(str, items))
