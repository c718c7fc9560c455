"""The whole model against the published code's recorded logits, losses, gradients and answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from integrations.llava.model import FusedLlavaForConditionalGeneration, build_model
from layerfuse.backbones import create_backbone
from layerfuse.fusers import create_fuser
from tests.goldens_support import from_published_names

VOCABULARY = 512
PUBLISHED_IMAGE = -200
CASES = ("single", "batch2_padded", "mixed_batch3", "text_only", "two_images", "image_mid_prompt")


def published_model(folder: Path, weights: dict[str, torch.Tensor]) -> FusedLlavaForConditionalGeneration:
    """Build our model around the recorded backbone, with the published checkpoint's other weights."""
    backbone = create_backbone("transformers", str(folder / "clip_tower"), layers=(-8, -6, -5, -3, -2))
    fuser = create_fuser("mmfuser", in_channels=64, num_layers=5)
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    )
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **{key: config[key] for key in keys}))
    own = set(llm.state_dict())
    llm.load_state_dict({name: tensor for name, tensor in weights.items() if name in own})
    model = build_model(backbone, fuser, llm, image_token_id=VOCABULARY)
    load_projector(model, weights)
    return model.eval()


def projector_names(model: FusedLlavaForConditionalGeneration) -> dict[str, str]:
    """Published name -> our name, of everything in the published projector."""
    names = {
        f"model.mm_projector.0.{key}": f"model.fuser.{ours}"
        for key, ours in from_published_names(fuser_of(model)).items()
    }
    for theirs, ours in (("1", "linear_1"), ("3", "linear_2")):
        for kind in ("weight", "bias"):
            names[f"model.mm_projector.{theirs}.{kind}"] = f"model.multi_modal_projector.{ours}.{kind}"
    return names


def fuser_of(model: FusedLlavaForConditionalGeneration) -> Any:
    return model.model.fuser


def load_projector(model: FusedLlavaForConditionalGeneration, weights: dict[str, torch.Tensor]) -> None:
    names = projector_names(model)
    given = {names[name]: tensor for name, tensor in weights.items() if "mm_projector" in name}
    assert len(given) == 28
    assert not model.load_state_dict(given, strict=False).unexpected_keys


def expanded(case: dict[str, torch.Tensor], num_tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels with every image token repeated, padded to one length on the right."""
    rows = []
    for ids, mask, labels in zip(case["input_ids"], case["attention_mask"], case["labels"], strict=True):
        kept = mask.bool()
        ids, labels = ids[kept], labels[kept]
        repeats = torch.where(ids == PUBLISHED_IMAGE, num_tokens, 1)
        ids = torch.where(ids == PUBLISHED_IMAGE, VOCABULARY, ids)
        rows.append((ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row[0] for row in rows], batch_first=True)
    labels = pad([row[1] for row in rows], batch_first=True, padding_value=-100)
    return ids, pad([torch.ones_like(row[0]) for row in rows], batch_first=True), labels


@pytest.fixture(scope="module")
def recorded(goldens: Path) -> Path:
    return goldens / "tiny_llava"


@pytest.fixture(scope="module")
def model(recorded: Path) -> FusedLlavaForConditionalGeneration:
    return published_model(recorded, load_file(recorded / "checkpoint" / "model.safetensors"))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss_of_goldens(name: str, recorded: Path, model: FusedLlavaForConditionalGeneration) -> None:
    case = load_file(recorded / "cases" / f"{name}.safetensors")
    ids, mask, labels = expanded(case)
    # There, samples without image take a slot of black pixels; here, they have none.
    per_sample = (case["input_ids"] == PUBLISHED_IMAGE).sum(1).clamp(min=1)
    keep = (case["input_ids"] == PUBLISHED_IMAGE).any(1).repeat_interleave(per_sample)
    pixels = case["pixel_values"][keep]
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels if len(pixels) else None)

    assert torch.equal(mask, case["expanded.attention_mask"].to(mask.dtype))
    assert torch.equal(labels, case["expanded.labels"])
    torch.testing.assert_close(
        out.logits[..., :VOCABULARY][mask.bool()], case["logits"][mask.bool()], atol=2e-4, rtol=0
    )
    torch.testing.assert_close(out.loss, case["loss"][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["single", "two_images"])
def test_fused_and_projected_tokens_of_goldens(
    name: str, recorded: Path, model: FusedLlavaForConditionalGeneration
) -> None:
    case = load_file(recorded / "cases" / f"{name}.safetensors")
    with torch.no_grad():
        features = model.get_image_features(case["pixel_values"])

    torch.testing.assert_close(features.last_hidden_state, case["fuser.output"], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(features.pooler_output), case["projector.output"], atol=1e-4, rtol=0)


def test_gradients_of_goldens(recorded: Path) -> None:
    model = published_model(recorded, load_file(recorded / "checkpoint" / "model.safetensors"))
    case = load_file(recorded / "cases" / "batch2_padded.safetensors")
    ids, mask, labels = expanded(case)
    model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=case["pixel_values"]).loss.backward()
    names = projector_names(model) | {"lm_head.weight": "lm_head.weight"}
    parameters = dict(model.named_parameters())

    compared = 0
    for theirs, ours in names.items():
        expected, gradient = case[f"grad.{theirs}"], parameters[ours].grad
        assert gradient is not None
        atol = 2e-5 * float(expected.abs().max()) * (50 if "sampling_offsets" in theirs else 1)
        torch.testing.assert_close(gradient[: len(expected)], expected, atol=atol, rtol=0)
        compared += 1
    assert compared == 29


@pytest.mark.parametrize("name", ["single", "second", "image_mid_prompt", "two_images", "text_only_images_none"])
def test_greedy_answers_of_goldens(name: str, recorded: Path, model: FusedLlavaForConditionalGeneration) -> None:
    record = load_file(recorded / "cases" / "generation.safetensors")
    images = json.loads((recorded / "cases.json").read_text())["generation"][name].get("images") or []
    prompt = record[f"{name}.input_ids"]
    ids, mask, _ = expanded({"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "labels": prompt})
    prepare = dataclasses.replace(model.model.vision_tower.backbone.preprocessing, mode="pad")
    folder = recorded.parent / "images"
    # transformers encodes `pixel_values` if they are given, also as None.
    pixels = (
        {"pixel_values": prepare.batch([Image.open(folder / f"{image}.png") for image in images])} if images else {}
    )
    new = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **pixels,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )[:, ids.shape[1] :]

    # There, the first id is a BOS that generation from embeddings puts in front.
    assert new[0].tolist() == record[f"{name}.output_ids"][0, 1:].tolist()
