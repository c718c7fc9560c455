"""What two processes run for test_trainer.py: tiny runs that they share; what was found is left in a folder as JSON."""

from __future__ import annotations

import importlib
import json
from pathlib import Path


def main(rank: int, output: str) -> None:
    """Train with both averages, then with a sample that breaks one process."""
    folder = Path(output)
    tiny = importlib.import_module("tiny_training")
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
