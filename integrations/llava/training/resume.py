"""Checkpoints of a running stage: written whole or not at all, readable by any number of processes.

    <stage>/checkpoint-<step>/
        trained.safetensors           every trained parameter, whole, under its name
        optimizer-<state>.safetensors the optimizer's states (exp_avg, exp_avg_sq, step, …), one file each
        scheduler.pt, rng_state*.pth, trainer_state.json    as transformers' Trainer writes them

Frozen parameters are not in it: they come from where the run took them. One layout serves one process, DDP and FSDP2,
so that a run goes on with another number of processes; nothing in it unpickles code. DeepSpeed writes its own files
into the same folder and reads them back with the same number of processes only.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from transformers import Trainer

from layerfuse.errors import FileAccessError, InputError
from layerfuse.files import check_disk_space

from .distributed import any_process, on_main

__all__ = [
    "CheckpointingTrainer",
    "as_state",
    "as_stored",
    "checkpoints",
    "load_state",
    "load_trained",
    "own_part",
    "save_state",
    "state_bytes",
    "trained_state",
]

_TRAINED = "trained.safetensors"
_SCHEDULER = "scheduler.pt"
_SCRATCH = ".saving"


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of a stage, oldest first; a folder that somebody named otherwise is none."""
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def state_bytes(model: nn.Module) -> int:
    """Bytes that a checkpoint of a model takes: its trained parameters and AdamW's two states of each, in float32."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained * 4 * 3


def save_state(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write trained parameters and optimizer states into a folder that exists; an OSError if that is not possible.

    Every process has to call this, the main one writes. The model may be wrapped or plain.
    """
    parameters, main = _trained(model), PartialState().is_main_process
    # A parameter that never had a gradient has no state.
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    files: dict[str, dict[str, torch.Tensor]] = {_TRAINED: dict(parameters)}
    for kind in sorted({kind for state in states.values() for kind in state}):
        own = {name: as_stored(state[kind]) for name, state in states.items() if state.get(kind) is not None}
        files[f"optimizer-{kind}.safetensors"] = own
    for name, tensors in files.items():
        # The others wait for the disk here, and not in a collective, which gives up after a while.
        on_main(partial(_write, _whole(tensors, keep=main), folder / name))


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # bitsandbytes has one table of codes for all weights, and safetensors no tensor under two names.
    owners = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    try:
        save_file({n: t if owners[t.data_ptr()] == n else t.clone() for n, t in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise FileAccessError(
            getattr(error, "errno", None) or errno.EIO,
            f"a checkpoint could not be written to {path.parent} ({error}); the one before it is whole",
        ) from error


def trained_state(model: nn.Module, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Whole trained parameters, on the CPU, of a model whose engine may have taken them apart; empty without `keep`.

    Every process has to call this; one that does not keep them only sends its part.
    """
    return _whole(_trained(model), keep=keep)


def _whole(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, put together one by one, a collective of all processes; empty without `keep`."""
    state = {}
    for name, tensor in tensors.items():
        with _gathered(tensor):
            value = tensor.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                state[name] = value.cpu().contiguous()
    return state


def load_trained(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy what `trained_state` returned into a plain model; a ValueError with all names if it trains others."""
    names = _trained(model)
    _check_names("the trained parameters", names, state)
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(state[name])


def load_state(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Read the files of `save_state` into a model and its optimizer, which may be sharded in another way.

    Raises:
        ValueError: if the files do not hold exactly the trained parameters of this model; all names are listed.
    """
    names = _trained(model)
    # Fused and capturable AdamW count steps on the device, the others on the CPU.
    on_device = {
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group.get("fused") or group.get("capturable")
    }
    with torch.no_grad():
        for name, value in _read(folder / _TRAINED, names):
            parameter: torch.Tensor = names[name]
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(value)
        for path in sorted(folder.glob("optimizer-*.safetensors")):
            kind = path.stem.removeprefix("optimizer-")
            for name, value in _read(path, names, all_of_them=False):
                parameter = names[name]
                optimizer.state[parameter][kind] = as_state(parameter, value, on_device=parameter in on_device)


def as_stored(value: torch.Tensor | float) -> torch.Tensor:
    """An optimizer's state as files hold it; numbers of Python's become 64 bits, which torch's own counts are not."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def as_state(parameter: nn.Parameter, value: torch.Tensor, *, on_device: bool) -> torch.Tensor | float:
    """A state from a file, in the parameter's place; counts stay on the CPU unless they belong on the device."""
    if value.ndim == 0 and value.dtype in (torch.float64, torch.int64):
        return value.item()
    if value.ndim == parameter.ndim:
        return _placed_like(parameter, value)
    return value.to(parameter.device) if value.ndim or on_device else value


def _read(
    path: Path, names: Mapping[str, nn.Parameter], *, all_of_them: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor; of a sharded parameter, this process's part alone."""
    with _refusing_damage(path), safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        _check_names(f"checkpoint {path}", names if all_of_them else names.keys() & stored, stored)
        for name in sorted(stored):
            parameter = names[name]
            part = file.get_slice(name)
            if isinstance(parameter, DTensor) and len(part.get_shape()) == parameter.ndim:
                yield name, part[own_part(parameter)]
            else:
                yield name, file.get_tensor(name)


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Say in words that a file of a checkpoint cannot be read."""
    try:
        yield
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        # torch's words advise to run whatever code the file holds.
        reason = "it holds no numbers" if isinstance(error, UnpicklingError) else error
        raise InputError(
            f"{path} is damaged ({reason}). Remove the folder {path.parent}: the same command goes on from the "
            "checkpoint before it, or begins the stage anew."
        ) from error


def own_part(value: DTensor) -> tuple[slice, ...]:
    """Slices of a whole tensor that this process holds."""
    part = [slice(0, size) for size in value.shape]
    for dimension, placement in enumerate(value.placements):
        if isinstance(placement, Shard):
            start, stop = part[placement.dim].start, part[placement.dim].stop
            # torch.chunk's rule: equal parts, the last ones shorter or empty.
            size = -(-(stop - start) // value.device_mesh.size(dimension))
            first = min(start + size * value.device_mesh.get_local_rank(dimension), stop)
            part[placement.dim] = slice(first, min(first + size, stop))
    assert [each.stop - each.start for each in part] == list(value.to_local().shape)
    return tuple(part)


def _check_names(what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    missing, unexpected = sorted({*expected} - {*found}), sorted({*found} - {*expected})
    if missing or unexpected:
        raise InputError(
            f"{what} came from another model or stage. Missing: {', '.join(missing) or 'none'}; unexpected: "
            f"{', '.join(unexpected) or 'none'}. Continue with the recipe that began the run."
        )


def _gathered(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Put a parameter that ZeRO-3 has taken apart together while the block runs."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor])
    return gathered


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by the names of the plain model; DDP and compile put a module around it."""
    return {
        re.sub(r"(^|\.)(module|_orig_mod)\.", r"\1", name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _placed_like(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    mesh = parameter.device_mesh
    return DTensor.from_local(
        value.to(mesh.device_type),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class CheckpointingTrainer(Trainer):
    """Trainer whose checkpoints appear whole, and whose old ones go only once the new one is in place."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        folder = Path(self.args.output_dir or "")
        final, scratch = folder / f"checkpoint-{self.state.global_step}", folder / _SCRATCH
        on_main(lambda: self._make_room(scratch, final.name))
        try:
            self._write(scratch)
            any_process(False)  # all have written
            on_main(lambda: self._put_in_place(scratch, final))
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(scratch, ignore_errors=True)

    def _make_room(self, scratch: Path, name: str) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        assert isinstance(self.model, nn.Module)
        check_disk_space(scratch.parent, state_bytes(self.model), f"checkpoint {name}")
        scratch.mkdir(parents=True)

    def _write(self, scratch: Path) -> None:
        assert self.lr_scheduler is not None
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(str(scratch))  # type: ignore[operator]
        else:
            save_state(self.model_wrapped, _plain(self.optimizer), scratch)
        self._save_rng_state(str(scratch))
        if self.is_world_process_zero():
            torch.save(self.lr_scheduler.state_dict(), scratch / _SCHEDULER)
            self.state.save_to_json(str(scratch / "trainer_state.json"))

    def _put_in_place(self, scratch: Path, final: Path) -> None:
        """Rename the new checkpoint once it is on the disk, then remove old ones."""
        for path in scratch.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(scratch, final)
        if os.name != "nt":  # folders cannot be opened there
            folder = os.open(final.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        for old in checkpoints(final.parent)[: -(self.args.save_total_limit or 1)]:
            shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Leave the weights to `_load_optimizer_and_scheduler`, which comes when the model is wrapped or sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = _plain(self.optimizer), self.lr_scheduler
        assert scheduler is not None
        load_state(self.model_wrapped, optimizer, Path(checkpoint))
        with _refusing_damage(Path(checkpoint) / _SCHEDULER):
            state = torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
            scheduler.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # numpy 2 renamed what numpy's state is rebuilt with; a checkpoint is read by either version.
        rebuild: Any = np.empty(0).__reduce__()[0]
        names: list[Any] = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
        with _refusing_damage(Path(checkpoint or "") / "rng_state"), torch.serialization.safe_globals(names):
            super()._load_rng_state(checkpoint)


def _plain(optimizer: Any) -> Optimizer:
    """Optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]
