"""Forks savers that write two models into one folder in turn, kills each, and notes what is left.

Run by tests/test_killed_saves.py in a process of its own: models and libraries are loaded once for all savers.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from layerfuse import FusedEncoder, create_encoder
from layerfuse.errors import UserError

Save = Callable[[Path], object]
Load = Callable[[Path], nn.Module]
RANDOM_KILLS = 32


def fingerprint(model: Any) -> str:
    """Of all weights and the config of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    config = dict(model.config if isinstance(model, FusedEncoder) else model.config.to_dict())
    config.pop("_name_or_path", None)  # where it was loaded from
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def encoders() -> tuple[list[Save], Load]:
    """Two encoders of other depth and fuser."""
    sizes = {"embed_dim": 16, "num_heads": 2, "img_size": 32}
    build = partial(create_encoder, "timm:vit_base_patch16_224", layers=(1, 2), pretrained=False)
    models = [
        build(fuser=fuser, backbone_options={**sizes, "depth": depth})
        for fuser, depth in (("average", 2), ("concat", 3))
    ]
    return [model.save_pretrained for model in models], FusedEncoder.from_pretrained


def llava_models(folder: Path) -> tuple[list[Save], Load]:
    """Two whole models that lie in the folder; one is saved as a single file, one in several shards."""
    from integrations.llava.checkpoints.model_io import load_model, load_processor, save_model

    # tqdm's lock is shared by forked processes: one that is killed while it draws would leave it locked for all.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    saves: list[Save] = []
    for source, shard in (("one", "1GB"), ("other", "60KB")):
        model, processor = load_model(folder / source), load_processor(folder / source)
        model.save_pretrained = partial(model.save_pretrained, max_shard_size=shard)  # type: ignore[method-assign]
        saves.append(partial(save_model, model, processor))
    return saves, load_model


def die_at_rename(number: int | None) -> None:
    """Let this process kill itself at its rename of that number, from 0 on."""
    calls, rename = iter(range(10**9)), os.replace

    def counted(source: Path, target: Path) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = counted  # type: ignore[assignment]


def forked(saves: list[Save], folder: Path, *, kill_at: int | None = None, told: int | None = None) -> int:
    """Start a process that saves the models in turn, for ever, or until its rename of that number.

    After each save it writes a byte to the descriptor `told`.
    """
    process = os.fork()
    if process:
        return process
    die_at_rename(kill_at)
    while True:
        for save in saves:
            save(folder)
            if told is not None:
                os.write(told, b".")


def left(folder: Path, load: Load, names: dict[str, str]) -> str:
    """Name what a folder holds: a model, an error in words, or "mixture"."""
    try:
        return names.get(fingerprint(load(folder)), "mixture")
    except UserError as error:
        return f"refused: {error}"


def main(kind: str, folder: Path) -> None:
    """Kill savers at random moments, then at each rename; print what each left, as JSON."""
    torch.manual_seed(0)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # slow, and no protection against signals
    signal.alarm(240)  # rather than wait for ever for a process that waits for something
    saves, load = encoders() if kind == "encoder" else llava_models(folder)
    names, durations = {}, []
    for name, save in zip("AB", saves, strict=True):
        started = time.perf_counter()
        save(folder / name)
        durations.append(time.perf_counter() - started)
        names[fingerprint(load(folder / name))] = name
    assert len(names) == 2
    target = folder / "target"
    saves[0](target)
    found: dict[str, list[str]] = {"random": [], "numbered": []}
    moments = random.Random(0)
    gc.freeze()  # savers collect garbage, and would copy all memory to look at what was imported
    for _ in range(RANDOM_KILLS):
        # At some time in one of the first three saves, however slow the machine is.
        reader, writer = os.pipe()
        process = forked(saves, target, told=writer)
        for _ in range(moments.randrange(3)):
            os.read(reader, 1)
        time.sleep(moments.uniform(0, max(durations)))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)
        found["random"].append(left(target, load, names))
    # B over A, killed at every step.
    for number in range(60):
        saves[0](target)
        process = forked(saves[::-1], target, kill_at=number)
        os.waitpid(process, 0)
        found["numbered"].append(left(target, load, names))
        if found["numbered"][-1] == "B":
            break
    saves[1](target)
    print(json.dumps(found | {"last": left(target, load, names), "hidden": [p.name for p in target.glob(".*")]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
