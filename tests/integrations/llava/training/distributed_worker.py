"""What processes run for test_distributed.py and test_interruption.py: one training each, results left in files."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava.__main__ import main
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.modeling import compilation
from integrations.llava.training import start as starting
from integrations.llava.training import train
from integrations.llava.training.signals import RunInterrupted


class AskToStop(TrainerCallback):
    """Sends SIGTERM to the second process in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_pre_optimizer_step(args, state, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step + 1 == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class IsSharded(TrainerCallback):
    """Fails unless every trained parameter is a DTensor: accelerate may fall back to DDP without a word.

    So it does unless blocks are taken apart again after their forward pass, and gradients summed in float32.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **_: Any
    ) -> None:
        blocks = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
        assert blocks
        for block in blocks:
            block.register_forward_hook(_is_taken_apart)
        if args.bf16:
            policy = model._get_fsdp_state()._mp_policy
            assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **_: Any
    ) -> None:
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters() if parameter.requires_grad)


def _is_taken_apart(block: torch.nn.Module, *_: Any) -> None:
    assert all(isinstance(parameter, DTensor) for parameter in block.parameters())


def _is_fsdp2(state: Any) -> bool:
    return state.distributed_type == DistributedType.FSDP and state.fsdp_plugin.fsdp_version == 2


@contextmanager
def engines_on_cpu() -> Iterator[None]:
    """Let accelerate use FSDP2 and DeepSpeed on CPUs: it leaves these out of the machines that it knows them on."""
    plain = accelerate.state.AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, deepspeed_plugin: Any = None, **options: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
        elif deepspeed_plugin is not None:
            self.distributed_type = DistributedType.DEEPSPEED
            plugins = deepspeed_plugin if isinstance(deepspeed_plugin, dict) else {"default": deepspeed_plugin}
            for plugin in plugins.values():
                plugin.set_mixed_precision("no")
            next(iter(plugins.values())).select(_from_accelerator_state=True)
            self.deepspeed_plugins = deepspeed_plugin

    with (
        mock.patch.object(accelerate.state.AcceleratorState, "__init__", patched),
        mock.patch.object(accelerate.state.AcceleratorState, "is_fsdp2", property(_is_fsdp2)),
        mock.patch.object(starting, "check_engine", lambda *_, **__: None),
        mock.patch.object(compilation, "_BACKEND", "aot_eager"),
    ):
        yield


def run(
    rank: int, folder: str, name: str, engine: str, stop_at: int | None, go_on: bool, changes: dict[str, Any]
) -> None:
    """Finetune with an engine; if told so, stop on request at a step, and go on."""
    recipe = load_recipe(Path(folder) / "recipe.yaml", changes | {"finetune.engine": engine})
    checks: list[TrainerCallback] = [IsSharded()] if engine == "fsdp2" else []

    def start(*callbacks: TrainerCallback) -> None:
        adapter = Path(folder) / "adapter.safetensors"
        output = Path(folder) / name
        train(recipe, output, stages=["finetune"], adapter=adapter, callbacks=[*checks, *callbacks])

    with engines_on_cpu():
        if stop_at is not None:
            try:
                start(AskToStop(stop_at))
            except RunInterrupted as stop:
                (Path(folder) / f"{name}.stopped").write_text(str(stop))
        if go_on:
            start()


def both_engines(rank: int, folder: str) -> None:
    """One engine after the other in one run: none leaves anything to the next."""
    with engines_on_cpu():
        recipe = load_recipe(Path(folder) / "recipe.yaml", {"pretrain.engine": "fsdp2", "finetune.engine": "ddp"})
        train(recipe, Path(folder) / "fsdp2_then_ddp")


def command(rank: int, arguments: list[str]) -> int:
    """Run a command of the command line, and listen to Ctrl-C, which a shell has jobs in the background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(arguments)


def command_killed(rank: int, arguments: list[str], metrics: str) -> int:
    """The same; the second process gets SIGTERM at any moment after four lines of a run's metrics."""
    if rank == 1:
        threading.Thread(target=_kill_soon, args=(Path(metrics),), daemon=True).start()
    return main(arguments)


def _kill_soon(metrics: Path) -> None:
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 4):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
