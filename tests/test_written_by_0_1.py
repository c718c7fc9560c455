"""What version 0.1 wrote (commit 6df16e5) loads, computes the same, and goes on.

`written_by_0_1` holds an encoder, the parts and data of a tiny recipe, a run of it that finished and one that was
stopped after a step of its second stage; `expected.safetensors` is what that version computed with them, and
`names.json` what its packages had in `__all__`.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from integrations.llava.checkpoints.connector import load_connector
from integrations.llava.checkpoints.model_io import load_model, load_processor
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.training.train import train
from layerfuse import FusedEncoder

WRITTEN = Path(__file__).with_name("written_by_0_1")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(WRITTEN / "expected.safetensors")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder that the recipe's paths start from."""
    copy = shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(copy)
    return copy


MOVED = {
    "integrations.llava.convert": "integrations.llava.checkpoints",
    "integrations.llava.demo": "integrations.llava.cli.demo",
    "integrations.llava.engines": "integrations.llava.training.engines",
    "integrations.llava.estimate": "integrations.llava.dry_run",
}


def test_every_public_name() -> None:
    names = json.loads((WRITTEN / "names.json").read_text())

    assert len(names) > 10
    missing = [f"{module}.{name}" for module in names for name in names[module] if not has(module, name)]
    assert missing == []


def has(module: str, name: str) -> bool:
    """Whether a package has a name; those that were moved as a whole are looked for where CHANGELOG.md says."""
    place = (
        "integrations.llava.cli.evaluate" if name == "main" and "evaluation" in module else MOVED.get(module, module)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return hasattr(importlib.import_module(place), name)


def test_an_encoder(expected: dict[str, torch.Tensor]) -> None:
    encoder = FusedEncoder.from_pretrained(WRITTEN / "encoder")

    with torch.no_grad():
        torch.testing.assert_close(encoder(expected["images"]), expected["tokens"], rtol=1e-5, atol=1e-5)


def test_a_trained_model_and_its_processor(expected: dict[str, torch.Tensor]) -> None:
    model, processor = load_model(WRITTEN / "finished"), load_processor(WRITTEN / "finished")
    content = [{"type": "image", "image": Image.open(WRITTEN / "data" / "1.png")}]
    content += [{"type": "text", "text": "What number is it?"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )

    assert torch.equal(batch["input_ids"], expected["input_ids"])
    # Pillow 13 resamples up to one grey level otherwise than 10 to 12: 1 / 255 / 0.26.
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=0.016)
    batch["pixel_values"] = expected["pixel_values"]
    with torch.no_grad():
        logits = model(**batch).logits[:, -4:]
    # The image token's, the last one, was masked by 0.1's head.
    torch.testing.assert_close(logits[..., :-1], expected["logits"][..., :-1], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), expected["answer"])


def test_an_adapter() -> None:
    model = load_model(WRITTEN / "finished")
    load_connector(model, ("fuser", "projector"), WRITTEN / "finished" / "pretrain" / "adapter.safetensors")

    weights = load_file(WRITTEN / "finished" / "pretrain" / "adapter.safetensors")
    state = model.state_dict()
    found = [tensor for name, tensor in state.items() if "fuser" in name or "projector" in name]
    assert len(weights) == len(found)
    for tensor in weights.values():
        assert any(tensor.shape == other.shape and torch.equal(tensor, other) for other in found)


def test_a_recipe() -> None:
    recipe = load_recipe(WRITTEN / "recipe.yaml")

    assert (recipe.name, recipe.model.fuser, recipe.model.fuser_options) == ("mmfuser_7b", "mmfuser", {"num_heads": 2})
    assert (recipe.finetune.learning_rates, recipe.finetune.save_every) == ({"fuser": 1e-4}, 1)


@pytest.mark.parametrize("core", ["core", "_core"])  # of numpy 1 and of numpy 2
def test_a_stopped_run_goes_on_to_the_weights_of_the_finished_one(core: str, here: Path) -> None:
    state = here / "stopped" / "finetune" / "checkpoint-2" / "rng_state.pth"
    with zipfile.ZipFile(state) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(state, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(b"cnumpy._core.multiarray", f"cnumpy.{core}.multiarray".encode()))
    folder = train(load_recipe("recipe.yaml"), "stopped")

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (here / "finished" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows if "loss" in row] == [
        (row["stage"], row["step"]) for row in before if "loss" in row
    ]
    trained, finished = (load_file(here / name / "model.safetensors") for name in ("stopped", "finished"))
    assert trained.keys() == finished.keys()
    for name, tensor in finished.items():
        torch.testing.assert_close(
            trained[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
