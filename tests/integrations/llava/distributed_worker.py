"""What two processes run for test_distributed.py: one start, several runs, results left in files.

torchrun --nproc-per-node 2 tests/integrations/llava/distributed_worker.py FOLDER ENGINE …
"""

from __future__ import annotations

import os
import signal
import sys
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

from integrations.llava import train as training
from integrations.llava.interruption import RunInterrupted
from integrations.llava.recipe_files import load_recipe


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
    """Fails unless every trained parameter is a DTensor: accelerate may fall back to DDP without a word."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **_: Any
    ) -> None:
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters() if parameter.requires_grad)


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
        mock.patch.object(training, "check_engine", lambda *_, **__: None),
    ):
        yield


def run(
    folder: Path, name: str, engine: str, *, stop_at: int | None = None, go_on: bool = True, **changes: Any
) -> None:
    """Finetune with an engine; if told so, stop on request at a step, and go on."""
    overrides = {f"finetune.{key}": value for key, value in changes.items()} | {"finetune.engine": engine}
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    checks: list[TrainerCallback] = [IsSharded()] if engine == "fsdp2" else []

    def start(*callbacks: TrainerCallback) -> None:
        adapter = folder / "adapter.safetensors"
        training.train(recipe, folder / name, stages=["finetune"], adapter=adapter, callbacks=[*checks, *callbacks])

    if stop_at is not None:
        try:
            start(AskToStop(stop_at))
        except RunInterrupted as stop:
            (folder / f"{name}.stopped").write_text(str(stop))
    if go_on:
        start()


def fail_in_all(folder: Path) -> None:
    """Give data that only the main process looks at, and write down what each process hears of them."""
    rank = os.environ["RANK"]
    (folder / "broken.json").write_text('[{"id": "x", "conversations": []}]')
    recipe = load_recipe(folder / "recipe.yaml", {"finetune.data.path": str(folder / "broken.json")})
    try:
        training.train(recipe, folder / "never", stages=["finetune"])
    except ValueError as error:
        (folder / f"heard-{rank}").write_text(str(error))


def main() -> None:
    """Run everything with each engine; the folder holds recipe.yaml and adapter.safetensors."""
    folder = Path(sys.argv[1])
    for engine in sys.argv[2:]:
        with engines_on_cpu():
            run(folder, engine, engine)
            run(folder, f"{engine}_resumed", engine, stop_at=3)
            run(folder, f"{engine}_left", engine, stop_at=3, go_on=False)
            run(folder, f"{engine}_mixed", engine, group_by_modality=False)
            run(folder, f"{engine}_accumulated", engine, micro_batch_size=1)
    fail_in_all(folder)
    if "fsdp2" in sys.argv[2:]:
        # One engine after the other in one run: none leaves anything to the next.
        with engines_on_cpu():
            recipe = load_recipe(folder / "recipe.yaml", {"pretrain.engine": "fsdp2", "finetune.engine": "ddp"})
            training.train(recipe, folder / "fsdp2_then_ddp")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
