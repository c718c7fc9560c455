"""What two processes run for test_trial.py: a start that finds no memory in the second one."""

from __future__ import annotations

from pathlib import Path

from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.training import train
from layerfuse.errors import InputError
from tests.integrations.llava.training.memory_limits import limited


def main(rank: int, folder: str, engine: str, limit: int) -> None:
    """Finetune; what is raised is left in a file."""
    recipe = load_recipe(Path(folder) / "recipe.yaml", {"finetune.engine": engine})
    try:
        with limited(limit if rank else 10**9):
            train(recipe, Path(folder) / "run", stages=["finetune"], adapter="random")
    except InputError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))
