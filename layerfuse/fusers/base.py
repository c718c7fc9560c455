"""What every fuser promises, and the registry they are chosen from by name.

A fuser turns the feature maps of L layers into one set of visual tokens. It sees ``FeatureMaps`` and nothing of the
backbone. To write one, subclass ``Fuser``, decorate it with ``@FUSERS.register("name")`` and implement ``fuse`` and
``flops``. Packages announce theirs under the entry point group ``layerfuse.fusers``.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.registry import Registry, unknown_name_message

__all__ = ["FUSERS", "Fuser", "FuserCost", "create_fuser", "fuser_from_config"]


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
    """What a fuser costs, known before anything is run or allocated.

    Args:
        parameters: number of parameters.
        out_channels: C_out of the fused tokens.
        num_tokens: fused tokens per image.
        flops: floating point operations per image, 2 * multiply-adds of matrix products and weighted sums; norms,
            softmax and element-wise work are left out, as is customary.
    """

    parameters: int
    out_channels: int
    num_tokens: int
    flops: int


class Fuser(nn.Module, abc.ABC):
    """Base class of all fusers.

    Args:
        in_channels: C of every map, or one number per map.
        num_layers: number of maps L.
        out_channels: C_out; if left out, the width of the last map.
        options: the subclass's own constructor arguments as they were given, JSON-able; they go into ``config``.

    Attributes:
        name: what ``FUSERS.register`` wrote on the class.
        equal_grids: whether all maps must share one grid.
        equal_channels: whether all maps must share one width.

    Raises:
        ValueError: if counts or widths are impossible, or widths differ where they must not.
        TypeError: if ``options`` are not exactly the subclass's own constructor arguments.
    """

    name: ClassVar[str] = ""
    equal_grids: ClassVar[bool] = True
    equal_channels: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        out_channels: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.in_channels = _widths(in_channels, num_layers)
        if self.equal_channels and len(set(self.in_channels)) > 1:
            raise InputError(
                f"fuser {self.name!r} got maps of widths {_listed(self.in_channels)}; it needs one width for all maps. "
                "Tap layers of one width, or use 'concat'."
            )
        self.out_channels = self.in_channels[-1] if out_channels is None else out_channels
        self.options: dict[str, Any] = dict(options or {})
        own = _own_options(type(self))
        if set(self.options) != set(own):
            raise InvalidTypeError(
                f"{type(self).__name__} takes the options ({_listed(own)}) but passed ({_listed(self.options)}) to "
                "Fuser.__init__(options=...); pass each one as it was given, so that a saved config rebuilds the fuser."
            )

    def forward(self, features: FeatureMaps) -> torch.Tensor:
        """Check the maps and fuse them, in the precision of the fuser's parameters; maps of another one are converted.

        Args:
            features: L maps, each (B, N_l, C_l).

        Returns:
            (B, N, C_out) fused tokens, row-major over ``out_grid``, in the dtype of the maps.

        Raises:
            ValueError: if number, widths or grids of the maps are not what the fuser was built for.
        """
        self._check_grids(features.grids)
        if features.channels != self.in_channels:
            raise InputError(
                f"fuser {self.name!r} got maps of widths {_listed(features.channels)}; it was built for "
                f"{_listed(self.in_channels)}. Build it with in_channels=[{_listed(features.channels)}]."
            )
        own, given = self._dtype, features.maps[0].dtype
        # Under autocast, torch chooses the precision of each operation.
        if own in (None, given) or torch.is_autocast_enabled(features.maps[0].device.type):
            return self.fuse(features)
        converted = replace(features, maps=tuple(feature_map.to(own) for feature_map in features))
        return self.fuse(converted).to(given)

    @property
    def _dtype(self) -> torch.dtype | None:
        """Of the first floating parameter: the precision that the fuser computes in."""
        return next((parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()), None)

    @abc.abstractmethod
    def fuse(self, features: FeatureMaps) -> torch.Tensor:
        """Fuse maps whose number, widths and grids have been checked.

        Args:
            features: L maps, each (B, N_l, C_l).

        Returns:
            (B, N, C_out) fused tokens, row-major over ``out_grid``.
        """

    @abc.abstractmethod
    def flops(self, grids: Sequence[Grid]) -> int:
        """Count floating point operations per image, as ``FuserCost.flops`` defines them.

        Args:
            grids: (H, W) of each of the L maps, in patches.
        """

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        """Return the grid of the fused tokens: that of the last map, unless a fuser says otherwise.

        Args:
            grids: (H, W) of each of the L maps, in patches.
        """
        return grids[-1]

    def num_tokens(self, grids: Sequence[Grid]) -> int:
        """Return the number N of fused tokens per image.

        Args:
            grids: (H, W) of each of the L maps, in patches.
        """
        height, width = self.out_grid(grids)
        return height * width

    def cost(self, grids: Sequence[Grid]) -> FuserCost:
        """Tell what the fuser costs on maps of these grids; also of a fuser built on the meta device.

        Args:
            grids: (H, W) of each of the L maps, in patches.

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
        """Return the layers that the fuser's source taps of a backbone of this depth, in the order the fuser takes them.

        Args:
            depth: number of the backbone's blocks.

        Returns:
            Layer numbers (0 = embeddings, ``depth`` = the last block); None if none were published for this depth.
        """
        return None

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able description from which ``fuser_from_config`` builds the same architecture."""
        uniform = len(set(self.in_channels)) == 1
        in_channels = self.in_channels[0] if uniform else list(self.in_channels)
        return {"name": self.name, "in_channels": in_channels, "num_layers": self.num_layers, **self.options}

    def reset_parameters(self) -> None:
        """Initialise all parameters as at construction; needed after building on the meta device.

        A fuser that gives its modules other numbers than they give themselves does so here, not in ``__init__``, which
        calls this method: see examples/write_a_fuser.py.
        """
        _reset_children(self)

    def extra_repr(self) -> str:
        """Show the config when printed."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config.items() if key != "name")

    def _check_grids(self, grids: Sequence[Grid]) -> None:
        if len(grids) != self.num_layers:
            raise InputError(
                f"fuser {self.name!r} got {len(grids)} maps; it was built for num_layers={self.num_layers}. Tap "
                f"as many layers, or build it with num_layers={len(grids)}."
            )
        if self.equal_grids and len(set(grids)) > 1:
            raise InputError(
                f"fuser {self.name!r} got maps of grids {_listed(f'{height}x{width}' for height, width in grids)}; it "
                "needs one grid for all maps. Tap layers of one grid, or use 'mmfuser', which samples across grids."
            )


def create_fuser(
    name: str,
    *,
    in_channels: int | Sequence[int],
    num_layers: int,
    options: Mapping[str, Any] | None = None,
) -> Fuser:
    """Build a fuser by name.

    Args:
        name: a name from ``FUSERS``.
        in_channels: C of every map, or one number per map.
        num_layers: number of maps L.
        options: the fuser's own constructor arguments by name.

    Returns:
        The fuser, freshly initialised.

    Raises:
        ValueError: if the name or an option is unknown, an option without default is missing, or a value is
            not allowed.
    """
    fuser_class = FUSERS.get(name)
    if fuser_class.name != name:
        raise InputError(
            f"the entry point {name!r} leads to {fuser_class.__qualname__}, which is named {fuser_class.name!r}; "
            f"decorate the class with @FUSERS.register({name!r})."
        )
    options = dict(options or {})
    own = _own_options(fuser_class)
    for option in options:
        if option not in own:
            raise InputError(unknown_name_message(f"option of fuser {name!r}", option, own))
    missing = [
        option for option, parameter in own.items() if parameter.default is parameter.empty and option not in options
    ]
    if missing:
        raise InputError(f"fuser {name!r} needs the options {_listed(missing)}; give them in options.")
    build: Callable[..., Fuser] = fuser_class
    return build(in_channels, num_layers, **options)


def fuser_from_config(config: Mapping[str, Any]) -> Fuser:
    """Build the fuser that a config describes.

    Args:
        config: as from ``Fuser.config``.

    Returns:
        A fuser of the same architecture, freshly initialised.

    Raises:
        ValueError: if a key is missing or unknown.
    """
    missing = [key for key in ("name", "in_channels", "num_layers") if key not in config]
    if missing:
        raise InputError(
            f"the fuser config lacks {_listed(missing)}; got the keys {_listed(config) or 'none'}. A config holds "
            "name, in_channels, num_layers and the fuser's options."
        )
    options = {key: value for key, value in config.items() if key not in ("name", "in_channels", "num_layers")}
    return create_fuser(
        config["name"], in_channels=config["in_channels"], num_layers=config["num_layers"], options=options
    )


def _own_options(fuser_class: type[Fuser]) -> dict[str, inspect.Parameter]:
    """Constructor arguments of a fuser beyond the two that all share."""
    if fuser_class.__init__ is Fuser.__init__:
        return {}  # no constructor of its own, no options of its own
    parameters = inspect.signature(fuser_class).parameters
    return {name: entry for name, entry in parameters.items() if name not in ("in_channels", "num_layers")}


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
