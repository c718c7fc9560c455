"""Leaner ways to take the same step: losses within 1e-5 of the plain way, with every engine, stopped and gone on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integrations.llava.config.schema import Recipe
from integrations.llava.training import train
from tests.integrations.llava.training.test_distributed import finetuned, losses

PLAIN: dict[str, Any] = {"cross_entropy": "plain"}
LEAN: dict[str, dict[str, Any]] = {
    "chunked": {"cross_entropy": "chunked"},
    "padding_free": {"padding_free": True},
    "padding_free, chunked, recomputed": {
        "padding_free": True,
        "cross_entropy": "chunked",
        "gradient_checkpointing": True,
    },
}


def trained(recipe: Recipe, folder: Path, **changes: Any) -> Path:
    """Train the last stage alone."""
    return train(finetuned(recipe, **changes), folder, stages=["finetune"], adapter="random")


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Steps of two micro batches; of two epochs of samples with and without image, in no order."""
    return finetuned(tiny_recipe, micro_batch_size=2, max_steps=6, group_by_modality=False, learning_rate=1e-4)


@pytest.fixture(scope="module")
def plain(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(recipe, tmp_path_factory.mktemp("lean") / "plain", **PLAIN)


@pytest.mark.parametrize("changes", LEAN.values(), ids=LEAN.keys())
def test_losses_and_weights_are_those_of_the_plain_way(
    changes: dict[str, Any], recipe: Recipe, plain: Path, tmp_path: Path
) -> None:
    lean = trained(recipe, tmp_path / "lean", **{**PLAIN, **changes})

    assert losses(lean) != [losses(lean)[0]] * 6
    torch.testing.assert_close(losses(lean), losses(plain), atol=1e-5, rtol=0)
    expected = load_file(plain / "model.safetensors")
    torch.testing.assert_close(load_file(lean / "model.safetensors"), expected, atol=1e-4, rtol=0)


def test_no_logits_in_chunks_where_every_process_has_to_call_the_head_equally_often(recipe: Recipe) -> None:
    chunked = finetuned(recipe, cross_entropy="chunked").finetune

    assert chunked.logits_in_chunks
    assert not dataclasses.replace(chunked, engine="zero3").logits_in_chunks
    assert not dataclasses.replace(chunked, cross_entropy="plain").logits_in_chunks
