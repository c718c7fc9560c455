"""Likelihoods of given answers: against one pass a conversation, whatever the batch; what greedy decoding says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.inference.likelihood import answer_likelihoods
from integrations.llava.inference.predictor import Predictor
from integrations.llava.prompts import IGNORE_INDEX, render
from tests.integrations.llava.inference.answering_parts import PROMPTS
from tests.integrations.llava.tiny_parts import human_and_gpt

ANSWERS = ["one", "It is number one on a wall.", "", "</s>", "on", "What number?", "A", "assistant"]


def measured_alone(predictor: Predictor, image: Image.Image, prompt: str, answer: str) -> tuple[float, bool]:
    """The whole conversation as training writes it, in one pass without padding."""
    prepare = predictor.prepare
    written = render(
        human_and_gpt(f"<image>\n{prompt}", answer),
        template=prepare.template,
        encoder=prepare.encoder,
        image_token_id=prepare.image_token_id,
        num_images=1,
    )
    ids = torch.tensor(prepare.layout.expand(written.input_ids, prepare.sizes([image])))
    count = sum(label != IGNORE_INDEX for label in written.labels) - 1  # without the end
    pixels = prepare(image, prompt)["pixel_values"]
    with torch.no_grad():
        logits = predictor.model(input_ids=ids[None], pixel_values=pixels).logits[0]
    logits[:, prepare.image_token_id] = -torch.inf
    places = range(len(ids) - 1 - count, len(ids) - 1)
    total = sum(float(logits[place - 1].log_softmax(-1)[ids[place]]) for place in places)
    return total, all(int(logits[place - 1].argmax()) == int(ids[place]) for place in places)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_sum_is_that_of_one_pass_whatever_the_batch(
    predictor: Predictor, pictures: list[Image.Image], batch_size: int
) -> None:
    prompts = PROMPTS[:6]
    found = answer_likelihoods(predictor, pictures[:6], prompts, ANSWERS[:6], batch_size=batch_size)
    for own, image, prompt, answer in zip(found, pictures, prompts, ANSWERS, strict=False):
        expected, greedy = measured_alone(predictor, image, prompt, answer)
        assert own.log_probability == pytest.approx(expected, abs=1e-3)
        assert own.is_greedy == greedy
    assert found[2].log_probability == 0  # of no tokens
    assert found[2].is_greedy


def test_prompts_with_several_images_or_none_are_measured_as_one_by_one(
    predictor: Predictor, mixture: list[Any]
) -> None:
    together = answer_likelihoods(predictor, mixture, PROMPTS, ANSWERS, batch_size=8)
    alone = [
        answer_likelihoods(predictor, [images], [prompt], [answer])[0]
        for images, prompt, answer in zip(mixture, PROMPTS, ANSWERS, strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)
        assert one.is_greedy == other.is_greedy


def test_what_greedy_decoding_says_is_greedy(predictor: Predictor, pictures: list[Image.Image]) -> None:
    tokenizer, count = predictor.processor.tokenizer, 0
    for image in pictures:
        batch = predictor.collate([predictor.prepare(image, "What?")])
        ids = predictor.model.generate(**batch, do_sample=False, max_new_tokens=3)[0, batch["input_ids"].shape[1] :]
        text = tokenizer.decode(ids)
        if predictor.prepare.answer_ids(text) != ids.tolist():
            continue  # spelled with other tokens than training would take
        count += 1
        right, wrong = answer_likelihoods(predictor, [image] * 2, ["What?"] * 2, [text, "on a wall"])
        assert right.is_greedy
        assert not wrong.is_greedy
        assert right.log_probability > wrong.log_probability
    assert count


def test_numbers_that_differ_and_answers_that_do_not_fit_are_refused(
    predictor: Predictor, pictures: list[Image.Image]
) -> None:
    with pytest.raises(ValueError, match="got 2 images, 1 prompts and 1 answers; give as many of each"):
        answer_likelihoods(predictor, pictures[:2], ["What?"], ["one"])
    with pytest.raises(ValueError, match="its answer up to .* and the model reads 512"):
        answer_likelihoods(predictor, pictures[:1], ["What?"], ["number " * 400])
    assert answer_likelihoods(predictor, [], [], []) == []
