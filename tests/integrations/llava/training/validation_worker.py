"""What one process or two run for test_validation.py: a finetune whose best step is known in advance."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.training import train, validation

BEST = 2
"""Step that is told to have the lowest loss."""


def main(rank: int, folder: str, engine: str, name: str) -> None:
    """Finetune the recipe in a folder with an engine; the real loss goes into the log as `eval_measured`."""
    measured = validation.held_out_losses

    def told(trainer: Any, **options: Any) -> dict[str, float]:
        real = measured(trainer, **options)["loss"]
        return {"loss": float(trainer.state.global_step != BEST), "measured": real}

    recipe = load_recipe(Path(folder) / "recipe.yaml", {"finetune.engine": engine})
    adapter = Path(folder) / "adapter.safetensors"
    engines_on_cpu = importlib.import_module("distributed_worker").engines_on_cpu
    with engines_on_cpu(), mock.patch.object(validation, "held_out_losses", told):
        train(recipe, Path(folder) / name, stages=["finetune"], adapter=adapter)
