"""The vision model that a released checkpoint names is got from the hub: no more of it than is needed."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integrations.llava.checkpoints import convert
from integrations.llava.checkpoints import vision_weights as tower
from integrations.llava.checkpoints.model_io import load_model

Requests = list[list[str]]


@pytest.fixture
def requests(llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Requests:
    """A hub with one model, as OpenAI's CLIP is there: pickled, and text and vision in one file."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    shutil.copytree(llava_folder.parent / "tiny-clip", hub)
    weights = load_file(hub / "model.safetensors")
    vision = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in weights.items()}
    others = {"text_model.embeddings.position_ids": torch.zeros(1), "logit_scale": torch.zeros(())}
    torch.save(vision | others, hub / "pytorch_model.bin")
    (hub / "model.safetensors").unlink()
    asked: Requests = []

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "tiny-clip"
        asked.append(allow_patterns)
        cache.mkdir(exist_ok=True)
        for path in hub.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, cache / path.name)
        return str(cache)

    monkeypatch.setattr(tower, "snapshot_download", download)
    return asked


def test_weights_come_from_the_hub_where_the_checkpoint_has_none(
    requests: Requests, llava_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(llava_folder, tmp_path / "alone" / "checkpoint")
    there = load_model(convert(llava_folder, tmp_path / "beside"))
    assert not requests
    found = load_model(convert(tmp_path / "alone" / "checkpoint", tmp_path / "fetched"))
    assert any("pytorch_model*.bin" in patterns for patterns in requests)
    for name, tensor in there.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_only_the_config_comes_from_the_hub_where_the_checkpoint_has_weights(
    requests: Requests, mmfuser_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(mmfuser_folder, tmp_path / "alone" / "checkpoint")
    assert load_model(convert(tmp_path / "alone" / "checkpoint", tmp_path / "ours"))
    assert [name for patterns in requests for name in patterns if "safetensors" in name or "bin" in name] == []
