"""Training from a feature cache: every kind of model, runs that stop, two processes, disks and folders."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.config import Recipe, dump_recipe
from integrations.llava.data import read_samples
from integrations.llava.dry_run import dry_run, render
from integrations.llava.modeling import assemble, image_maps
from integrations.llava.training.engines import check_engine
from integrations.llava.training.signals import RunInterrupted
from integrations.llava.training.stage import stage_trainer
from integrations.llava.training.train import train
from layerfuse import files
from layerfuse.errors import InputError
from layerfuse.testing import tiny_backbone
from tests.integrations.llava.host_waits import HostWaits
from tests.integrations.llava.training.process_pairs import Nursery
from tests.integrations.llava.training.test_resume import StopAt
from tests.integrations.llava.training.trained_models import MODELS, model_recipe

Usage = namedtuple("Usage", "total used free")


def with_cache(recipe: Recipe, folder: Path | str, **changes: Any) -> Recipe:
    stages = {
        name: replace(recipe.stage(name), feature_cache=str(folder), **changes) for name in ("pretrain", "finetune")
    }
    return replace(recipe, **stages)  # type: ignore[arg-type]


def losses(folder: Path) -> list[tuple[str, int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"], row["loss"]) for row in rows if "loss" in row]


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def finetune_files(folder: Path) -> list[Path]:
    """Of the second stage, which pads pictures."""
    return [
        path
        for path in cached_files(folder)
        if json.loads((path.parents[1] / "map.json").read_text())["preprocessing"]["mode"] == "pad"
    ]


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_has_the_loss_and_gradients_that_pixels_give_without_a_wait(
    name: str, backbone_folder: Path, llm_folder: Path, sized_folder: Path, tmp_path: Path
) -> None:
    recipe = model_recipe(name, backbone_folder, llm_folder, sized_folder)
    stage = replace(recipe.finetune, feature_cache=str(tmp_path / "cache"))
    samples = read_samples(sized_folder / "train.json")
    trainer = stage_trainer(assemble(recipe.model, stage, seed=0), stage, samples, None, tmp_path, num_processes=1)
    model: Any = trainer.model
    dataset: Any = trainer.train_dataset
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    seen: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))

    def measured(cache: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        dataset.cache = cache
        # Samples of several sizes, and one of text alone.
        batch: Any = trainer.data_collator([dataset[index] for index in (0, 3, 8, 1)])
        given = {key: value for key, value in batch.items() if key != "sample_ids"}
        with HostWaits() as waits:
            loss = model.train()(**given, cross_entropy="chunked").loss
            wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        assert waits.found == []
        return loss.detach(), list(gradients)

    cache = dataset.cache
    whole, expected = measured(None)
    assert len(seen) == 1
    cached, gradients = measured(cache)
    assert len(seen) == 1, "nothing is encoded"
    cached_files(tmp_path / "cache")[0].unlink()  # of one image, of any layer
    for own in cache.maps:
        own.file(next(iter({path.stem for path in cached_files(own.folder)}))).unlink(missing_ok=True)
    some, others = measured(cache)
    collate: Any = trainer.data_collator
    collate.padding_free = True
    joined, as_one = measured(cache)
    for loss, own in ((cached, gradients), (some, others), (joined, as_one)):
        torch.testing.assert_close(loss, whole, atol=1e-6, rtol=1e-5)
        for given, wanted in zip(own, expected, strict=True):
            torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


def test_a_run_has_the_losses_of_one_without_and_the_next_run_encodes_nothing(
    tiny_recipe: Recipe, run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    caplog.set_level(logging.INFO)
    folder = train(with_cache(tiny_recipe, cache), tmp_path / "run")
    plain = losses(run_folder)
    assert [row[:2] for row in losses(folder)] == [row[:2] for row in plain]
    torch.testing.assert_close([row[2] for row in losses(folder)], [row[2] for row in plain], atol=1e-5, rtol=0)
    # The published first stage crops pictures, the second one pads them.
    assert caplog.text.count(f"feature cache {cache} lacks 8 of 8 images") == 2
    assert len(cached_files(cache)) == 8 * 4 * 2
    kept = {path: path.stat().st_mtime_ns for path in cached_files(cache)}

    # Another fuser, which reads one of the layers.
    select = replace(tiny_recipe.model, fuser="select", layers=(3,), fuser_options={})
    train(with_cache(replace(tiny_recipe, model=select), cache), tmp_path / "select", stages=["pretrain"])
    assert caplog.text.count("lacks 0 of 8 images") == 1
    assert {path: path.stat().st_mtime_ns for path in cached_files(cache)} == kept
    described = json.loads((cached_files(cache)[0].parents[1] / "map.json").read_text())
    assert described["layer"] in (1, 2, 3, 4) and described["computed"] == {"autocast": False, "device": "cpu"}


def test_a_picture_that_changed_is_encoded_again(
    tiny_recipe: Recipe, data_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(data_folder, tmp_path / "data")
    data = replace(
        tiny_recipe.pretrain.data, path=str(tmp_path / "data/pretrain.json"), image_folder=str(tmp_path / "data")
    )
    recipe = replace(tiny_recipe, pretrain=replace(tiny_recipe.pretrain, data=data))
    train(with_cache(recipe, tmp_path / "cache"), tmp_path / "first", stages=["pretrain"])
    Image.new("RGB", (30, 24), "red").save(tmp_path / "data" / "0.png")
    shutil.copy(tmp_path / "data" / "1.png", tmp_path / "data" / "2.png")
    caplog.set_level(logging.INFO)
    changed = train(with_cache(recipe, tmp_path / "cache"), tmp_path / "second", stages=["pretrain"])
    assert "lacks 1 of 8 images" in caplog.text
    plain = train(recipe, tmp_path / "plain", stages=["pretrain"])
    torch.testing.assert_close(
        [row[2] for row in losses(changed)], [row[2] for row in losses(plain)], atol=1e-5, rtol=0
    )
    assert losses(plain) != losses(tmp_path / "first")


def test_a_stopped_run_goes_on_from_a_cache_that_was_damaged_meanwhile(
    tiny_recipe: Recipe, run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = with_cache(tiny_recipe, tmp_path / "cache", num_workers=1)
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", callbacks=[StopAt("finetune", 1)])
    *damaged, cut = finetune_files(tmp_path / "cache")[:8]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[-500] ^= 1
        path.write_bytes(content)
    cut.write_bytes(b"")
    caplog.set_level(logging.INFO)
    train(recipe, tmp_path / "run")
    assert f"feature cache: {cut} is damaged" in caplog.text and "lacks 1 of 8 images" in caplog.text
    # What is cut off is found before the first step, another fault when the image is read.
    assert cut.exists() and not all(path.exists() for path in damaged)
    torch.testing.assert_close(
        [row[2] for row in losses(tmp_path / "run")], [row[2] for row in losses(run_folder)], atol=1e-5, rtol=0
    )
    # The cache may be left out when a run goes on, since losses are the same; that of rounded maps may not.
    rounded = with_cache(tiny_recipe, tmp_path / "cache", feature_cache_dtype="int8")
    with pytest.raises(ValueError, match=r"differs in .*feature_cache_dtype \('fp32' then, 'int8' now\)"):
        train(rounded, tmp_path / "run")


def test_two_processes_fill_a_cache_together_and_have_the_losses_of_one(
    tiny_recipe: Recipe, run_folder: Path, nursery: Nursery, tmp_path: Path
) -> None:
    finetune = replace(tiny_recipe.finetune, micro_batch_size=2, max_steps=6, log_every=1)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(replace(tiny_recipe, finetune=finetune)))
    shutil.copy(run_folder / "pretrain" / "adapter.safetensors", tmp_path)
    changes = {"finetune.feature_cache": str(tmp_path / "cache")}
    ended = nursery.run("distributed_worker:run", str(tmp_path), "ddp", "ddp", 3, True, changes)
    assert [each.code for each in ended] == [0, 0], "\n".join(map(str, ended))
    assert (tmp_path / "ddp.stopped").exists() and len(cached_files(tmp_path / "cache")) == 8 * 4
    ended = nursery.run("distributed_worker:run", str(tmp_path), "fsdp2", "fsdp2", None, True, changes)
    assert [each.code for each in ended] == [0, 0], "\n".join(map(str, ended))
    recipe = replace(tiny_recipe, finetune=finetune)
    plain = train(recipe, tmp_path / "plain", stages=["finetune"], adapter=tmp_path / "adapter.safetensors")
    for engine in ("ddp", "fsdp2"):
        torch.testing.assert_close(
            [row[2] for row in losses(tmp_path / engine)], [row[2] for row in losses(plain)], atol=1e-5, rtol=0
        )


def test_a_disk_without_room_is_said_before_an_image_is_encoded(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    asked = shutil.disk_usage

    def usage(path: Path) -> Any:
        return Usage(2**30, 2**30, 10) if str(path).startswith(str(full)) else asked(path)

    full.mkdir()
    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    with pytest.raises(OSError, match=r"the feature cache, 8 images, needs 0.00 GiB, but the disk of .*full"):
        train(with_cache(tiny_recipe, full / "cache"), tmp_path / "run")
    assert not cached_files(full)


def test_rounded_maps_train_with_losses_that_are_near(
    tiny_recipe: Recipe, run_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    for stored in ("bf16", "int8"):
        recipe = with_cache(tiny_recipe, tmp_path / "cache", feature_cache_dtype=stored)
        folder = train(recipe, tmp_path / stored, stages=["pretrain"])
        found, plain = ([row[2] for row in losses(each)][:3] for each in (folder, run_folder))
        assert found != plain
        torch.testing.assert_close(found, plain, atol=2e-2, rtol=0)


def test_zero3_is_refused() -> None:
    with pytest.raises(InputError, match="engine 'zero3'.*would wait for ever.*feature_cache.*use 'zero2' or 'fsdp2'"):
        check_engine("zero3", num_processes=2, cpu=False, cached=True)
    check_engine("zero3", num_processes=1, cpu=False, cached=True)


@pytest.mark.parametrize("uncached", [(0, 0, 1), (0, 1, 1, 0, 1), (1, 0, 0, 1, 0)])
def test_encoded_tiles_stand_where_they_stood_among_cached_ones(uncached: tuple[int, ...]) -> None:
    tower = tiny_backbone("timm", layers=(1, -1)).requires_grad_(False)
    which, pixels = torch.tensor(uncached, dtype=torch.bool), torch.randn(len(uncached), 3, 32, 32)
    whole = image_maps(tower, pixels)
    merged = image_maps(tower, pixels[which], whole.map(lambda tokens: tokens[~which]), which.tolist())
    for found, expected in zip((*merged, *merged.prefix), (*whole, *whole.prefix), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_pixels_and_maps_have_to_say_which_is_which() -> None:
    tower = tiny_backbone("timm", layers=(1,))
    pixels = torch.randn(3, 3, 32, 32)
    whole = tower(pixels).detach()
    mask = torch.tensor([True, False, True])
    found = image_maps(tower, pixels[mask], whole.map(lambda tokens: tokens[~mask].bfloat16()), mask.tolist())
    assert torch.equal(found[0][0], whole[0][0]) and torch.equal(found.prefix[0][2], whole.prefix[0][2])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0][1], whole[0][1], atol=1e-2, rtol=1e-2)
    for wrong in (None, [True, True], [False, True, False]):
        with pytest.raises(InputError, match="pixel_values are of 2 tiles and feature_maps of 1 others; give uncached"):
            image_maps(tower, pixels[mask], whole.map(lambda tokens: tokens[~mask]), wrong)


def test_a_dry_run_says_what_a_cache_takes(tiny_recipe: Recipe) -> None:
    text = render(dry_run(with_cache(tiny_recipe, "cache", feature_cache_dtype="bf16")))
    assert "pretrain: feature cache (bf16) of up to 8 pictures x 0.01 MiB: 0.00 GiB on disk" in text
    assert "feature cache" not in render(dry_run(tiny_recipe))


def test_a_backbone_that_learns_is_refused(tiny_recipe: Recipe) -> None:
    with pytest.raises(InputError, match="keeps the maps of a frozen backbone, and 'backbone' is among the trainable"):
        replace(tiny_recipe.pretrain, trainable=("backbone", "fuser"), feature_cache="cache")
