"""Run by torchrun: tiny runs shared by two processes; what was found is left in a folder as JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch


def main(folder: Path) -> None:
    """Train with both averages, then with a sample that breaks one process."""
    tiny = _load(Path(__file__).with_name("tiny_training.py"))
    unequal = [tiny.item("a", 1, 3, skipped="a"), tiny.item("b", 5, skipped="b")]
    for loss_average in ("micro_batch", "token"):
        trainer = tiny.tiny_trainer(folder / loss_average, unequal, loss_average=loss_average)
        assert type(trainer.model_wrapped).__name__ == "TinyModel"
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        if trainer.is_world_process_zero():
            rows = tiny.read_rows(folder / loss_average)
            (folder / f"{loss_average}.json").write_text(json.dumps(rows))
    trainer = tiny.tiny_trainer(folder / "broken", [tiny.item("good", 1), tiny.item("bad", tiny.BREAKS_LOSS)])
    try:
        trainer.train()
    except tiny.NonFiniteLossError as error:
        found = {"message": str(error), "weight": float(trainer.model.weight.detach())}
        (folder / f"broken-{trainer.args.process_index}.json").write_text(json.dumps(found))


def _load(path: Path) -> ModuleType:
    """Import a file: an installed package is called `tests`, too."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Left to the interpreter's end, threads of gloo sometimes abort the process.
    torch.distributed.destroy_process_group()
