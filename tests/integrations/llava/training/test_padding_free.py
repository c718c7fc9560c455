"""Batches without padding: losses and gradients of padded ones, for every kind of model; what cannot is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from integrations.llava.config import Recipe
from integrations.llava.data import Collator, read_samples
from integrations.llava.modeling import assemble
from integrations.llava.prompts import IGNORE_INDEX
from integrations.llava.training.signals import RunInterrupted
from integrations.llava.training.stage import stage_trainer
from integrations.llava.training.train import train
from layerfuse.errors import InputError
from tests.integrations.llava.tiny_parts import human_and_gpt
from tests.integrations.llava.training.test_distributed import finetuned, losses
from tests.integrations.llava.training.test_resume import StopAt
from tests.integrations.llava.training.trained_models import model_recipe

KINDS = ("mmfuser", "injection-mmfuser", "anyres-concat", "anyres-text_gated", "two_backbones-injection")
# Where samples begin and end in the row is seen by its first and last: no image, an image, two, one that is missing.
PICKED = (8, 0, 12, 3, 13, 9)
TWO = {"image": ["1.png", "4.png"], "conversations": human_and_gpt("<image> or <image>?", "Both.", "Sure?", "Yes.")}
MISSING = {"image": "missing.png", "conversations": human_and_gpt("<image>\nWhat?", "Two.")}


def prepared(name: str, folders: tuple[Path, Path, Path], tmp_path: Path, **changes: Any) -> tuple[Any, Any]:
    """A model and its collator without padding, and the samples; every parameter that learns is drawn."""
    recipe = model_recipe(name, *folders)
    data = replace(recipe.finetune.data, bad_samples="skip", max_length=290)
    stage = replace(recipe.finetune, padding_free=True, data=data, **changes)
    samples = [*read_samples(folders[-1] / "train.json"), TWO, MISSING]
    trainer = stage_trainer(assemble(recipe.model, stage, seed=0), stage, samples, None, tmp_path, num_processes=1)
    model: Any = trainer.model
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return trainer, [trainer.train_dataset[index] for index in PICKED]


@pytest.fixture
def folders(backbone_folder: Path, llm_folder: Path, sized_folder: Path) -> tuple[Path, Path, Path]:
    return backbone_folder, llm_folder, sized_folder


def measured(model: Any, batch: dict[str, Any], **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients."""
    given = {key: value for key, value in batch.items() if key not in ("sample_ids", "skipped")}
    loss = model.train()(**given, use_cache=False, **options)["loss"]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def assert_alike(one: Any, other: Any) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-6, rtol=1e-5)
    for given, wanted in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cross_entropy", ["plain", "chunked"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_has_the_loss_and_gradients_of_padded_samples(
    name: str, cross_entropy: str, folders: Any, tmp_path: Path
) -> None:
    trainer, samples = prepared(name, folders, tmp_path)
    packed, padded = trainer.data_collator(samples), Collator(0)(samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert packed["input_ids"].shape == (1, sum(lengths)) and padded["input_ids"].shape == (6, max(lengths))
    assert len(set(lengths)) > 3 and min(lengths) == 1 and len(packed["skipped"]) == 1
    assert len(packed["label_places"]) == len(padded["label_places"]) > 20

    options = {"cross_entropy": cross_entropy, "num_items_in_batch": torch.tensor(7)}
    assert_alike(measured(trainer.model, packed, **options), measured(trainer.model, padded, **options))


def test_a_sample_does_not_see_those_around_it(folders: Any, tmp_path: Path) -> None:
    trainer, (first, second, third, *_) = prepared("mmfuser", folders, tmp_path)
    model = trainer.model.eval()
    other = {**first, "input_ids": first["input_ids"].flip(0)}
    before, length = len(first["input_ids"]), len(second["input_ids"])

    def hidden(*samples: Any, **changes: Any) -> torch.Tensor:
        batch = trainer.data_collator(samples) | changes
        given = {key: batch[key] for key in ("input_ids", "position_ids", "pixel_values")}
        with torch.no_grad():
            return model.model(**given, use_cache=False)[0][0, before : before + length]

    own = hidden(first, second, third)
    assert torch.equal(hidden(other, second, third), own)
    torch.testing.assert_close(hidden(first, second), own, atol=1e-5, rtol=1e-5)
    as_one = torch.arange(before + length + len(third["input_ids"]))[None]
    crossed = [hidden(each, second, third, position_ids=as_one) for each in (first, other)]
    assert not torch.allclose(*crossed, atol=1e-3)


def test_no_sample_learns_to_predict_the_first_label_of_the_next(folders: Any, tmp_path: Path) -> None:
    trainer, samples = prepared("mmfuser", folders, tmp_path)
    for sample in samples:
        sample["labels"] = sample["labels"].clone()
        sample["labels"][0] = 5
    packed, padded = trainer.data_collator(samples), Collator(0)(samples)
    begins = packed["position_ids"] == 0

    assert begins.sum() == 6 and (packed["labels"][begins] == IGNORE_INDEX).all()
    ends = (begins[0].nonzero().flatten() - 1).tolist()
    assert not {*ends, packed["labels"].numel() - 1} & {*packed["label_places"].tolist()}
    expected = measured(trainer.model, padded, cross_entropy="plain")
    for cross_entropy in ("plain", "chunked"):
        assert_alike(measured(trainer.model, packed, cross_entropy=cross_entropy), expected)
    crossing = packed | {"labels": torch.cat([sample["labels"] for sample in samples])[None]}
    assert measured(trainer.model, crossing, cross_entropy="plain")[0] != expected[0]


def test_labels_are_found_where_the_collator_has_not(folders: Any, tmp_path: Path) -> None:
    trainer, samples = prepared("mmfuser", folders, tmp_path)
    for batch in (trainer.data_collator(samples), Collator(0)(samples)):
        places = batch.pop("label_places")
        found = measured(trainer.model, batch, cross_entropy="chunked")
        given = measured(trainer.model, batch | {"label_places": places}, cross_entropy="chunked")
        assert torch.equal(found[0], given[0])


def test_a_run_has_the_losses_of_a_padded_one_and_goes_on_with_the_same_bits(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Every token weighs alike, and a checkpoint of one way goes on in the other."""
    recipe = finetuned(tiny_recipe, micro_batch_size=2, max_steps=5, loss_average="token")
    options: dict[str, Any] = {"stages": ["finetune"], "adapter": "random"}
    padded = train(recipe, tmp_path / "padded", **options)
    lean = finetuned(recipe, padding_free=True, gradient_checkpointing="selective")
    whole = train(lean, tmp_path / "whole", **options)
    torch.testing.assert_close(losses(whole), losses(padded), atol=1e-5, rtol=0)
    assert len(set(losses(whole))) == 5

    for name, then in (("resumed", lean), ("changed", recipe)):
        with pytest.raises(RunInterrupted, match="stopped on request at step 3"):
            train(lean, tmp_path / name, callbacks=[StopAt("finetune", 3)], **options)
        train(then, tmp_path / name, **options)
    assert losses(tmp_path / "resumed") == losses(whole)
    assert losses(tmp_path / "changed")[:3] == losses(whole)[:3]
    torch.testing.assert_close(losses(tmp_path / "changed"), losses(padded), atol=1e-5, rtol=0)


def test_a_model_that_cannot_is_refused_before_the_first_of_two_stages(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = finetuned(tiny_recipe, padding_free=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
    for architecture, attention, match in (
        ({"model_type": "bloom"}, "eager", "stage finetune: padding_free .* BloomModel .* takes no position_ids"),
        (
            {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
            "sdpa",
            "OPTModel .* depends on those before",
        ),
    ):
        options = {"llm_pretrained": False, "llm_architecture": sizes | architecture, "attention": attention}
        model = replace(tiny_recipe.model, tokenizer=tiny_recipe.model.llm, **options)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=match):
            train(replace(recipe, model=model), tmp_path / "run")
        assert not (tmp_path / "run").exists()
