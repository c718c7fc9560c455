"""Forks `layerfuse extract`, kills it at random moments while it fills a store, and starts it again, until it ends.

Run by tests/test_store.py in a process of its own: `python killed_extraction.py PICTURES STORE`. It prints, as JSON,
how many pictures were in the store after each kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from layerfuse.cli import main
from layerfuse.store import FeatureStore

OPTIONS = ("--model", "timm:vit_tiny_patch16_224", "--image-size", "32", "--layers", "1", "-1", "--pretrained", "false")
PATIENCE = 200


def forked(pictures: str, out: str) -> int:
    """Start a process that extracts."""
    process = os.fork()
    if process:
        return process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = main(["extract", pictures, "--out", out, *OPTIONS, "--batch-size", "4", "--shard-size", "8"])
    os._exit(code)


def num_shards(out: str) -> int:
    return len(list(Path(out).glob("shard-*.safetensors")))


def kill_and_resume(pictures: str, out: str) -> list[int]:
    """Kill each extraction some random time after it wrote something, the first one before; then let one end."""
    moments = random.Random(0)
    left = []
    for round_ in range(6):
        before, process, ended = num_shards(out), forked(pictures, out), 0
        while round_ and num_shards(out) == before and not ended:
            time.sleep(0.002)
            ended, _ = os.waitpid(process, os.WNOHANG)
        assert not ended, "it ended before it could be killed"
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        left.append(len(FeatureStore(out)) if (Path(out) / "store.json").exists() else 0)
    _, status = os.waitpid(forked(pictures, out), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return left


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # slow, and no protection against signals
    signal.alarm(PATIENCE)
    print(json.dumps(kill_and_resume(sys.argv[1], sys.argv[2])))
