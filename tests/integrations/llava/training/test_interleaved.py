"""Several images a sample, anywhere in its texts: the loss is that of a sequence put together by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from integrations.llava.checkpoints.model_io import load_model, load_processor
from integrations.llava.config import Recipe
from integrations.llava.data import read_image
from integrations.llava.prompts import TextEncoder, get_template, render
from integrations.llava.training import train
from layerfuse.preprocessing import tile_pixels
from tests.integrations.llava.tiny_parts import human_and_gpt
from tests.integrations.llava.training.test_resume import rows
from tests.integrations.llava.training.test_run_starts import changed

SAMPLES = [
    {
        "id": "three",
        "image": ["0.png", "3.png", "5.png"],
        "conversations": human_and_gpt("Is <image> like <image>?", "It is one.", "And <image>\nthis?", "Number two."),
    },
    {
        "id": "two",
        "image": ["4.png", "1.png"],
        "conversations": human_and_gpt("<image><image>\nWhat number?", "One on a wall."),
    },
]


@torch.no_grad()
def by_hand(folder: Path, data: Path, order: tuple[int, ...] = (0, 1, 2)) -> float:
    """Mean loss of the answers' tokens, each sample alone: pieces of text and images' tokens one after the other."""
    model, processor = load_model(folder), load_processor(folder)
    template, image_id = get_template("v1"), model.config.image_token_index
    losses, count = 0.0, 0
    for sample in SAMPLES:
        names = [sample["image"][place] for place in order if place < len(sample["image"])]
        encoder = TextEncoder(processor.tokenizer, template.control_tokens)
        written = render(
            sample["conversations"],  # type: ignore[arg-type]
            template=template,
            encoder=encoder,
            image_token_id=image_id,
            num_images=len(names),
            max_length=2048,
        )
        backbone = model.model.vision_tower.backbone
        prepared = backbone.preprocessing.changed(mode="pad", upright=False)
        pixels = [tile_pixels(read_image(data / name), prepared, None) for name in names]
        images = [model.get_image_features(prepared.normalize(own)).pooler_output for own in pixels]
        embeds, labels = [], []
        for token, label in zip(written.input_ids, written.labels, strict=True):
            piece = images.pop(0)[0] if token == image_id else model.get_input_embeddings()(torch.tensor([token]))
            embeds.append(piece)
            labels += [label] * len(piece)
        assert not images
        hidden = model.model.language_model(inputs_embeds=torch.cat(embeds)[None]).last_hidden_state
        target = torch.tensor(labels)[1:]
        logits = model.lm_head(hidden)[0, :-1]
        logits[:, image_id] = -torch.inf  # it is no answer
        losses += float(functional.cross_entropy(logits, target, reduction="sum"))
        count += int((target != -100).sum())
    return losses / count


@pytest.mark.parametrize("padding_free", [False, True])
def test_images_stand_where_their_tags_are(
    padding_free: bool, tiny_recipe: Recipe, data_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(json.dumps(SAMPLES))
    data = dataclasses.replace(tiny_recipe.finetune.data, path=str(tmp_path / "data.json"))
    recipe = changed(tiny_recipe, "finetune", data=data, max_steps=1, learning_rate=0.0, padding_free=padding_free)
    recipe = changed(recipe, "finetune", batch_size=2, micro_batch_size=2)
    folder = train(recipe, tmp_path / "run", stages=["finetune"], adapter="random")
    ((_, _, loss),) = rows(folder)

    assert loss == pytest.approx(by_hand(folder, data_folder), rel=1e-5)
    assert loss != pytest.approx(by_hand(folder, data_folder, order=(1, 0, 2)), rel=1e-5)
