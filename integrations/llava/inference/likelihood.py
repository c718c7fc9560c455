"""How likely a model finds an answer that is given: for multiple choice, where each option is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerfuse.errors import InputError

from .batching import form_batches
from .encoded_images import EncodedImages
from .predictor import Predictor
from .prompt_builder import Images, PreparedPrompts, Prompt, as_list

__all__ = ["Likelihood", "answer_likelihoods"]


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of an answer.

    Attributes:
        log_probability: natural logarithm of the probability that the answer, its end not counted, stands behind its
            prompt: the sum over its tokens. The image token, which is never written, has none.
        is_greedy: whether greedy decoding would begin with this answer.
    """

    log_probability: float
    is_greedy: bool


def answer_likelihoods(
    predictor: Predictor,
    images: Sequence[Images],
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    batch_size: int = 8,
) -> list[Likelihood]:
    """Tell how likely answers are behind their prompts, each written as in training.

    Args:
        predictor: the model.
        images: per prompt, as a `Predictor` takes them.
        prompts: as a `Predictor` takes them; one that several answers belong to is given with each.
        answers: one per prompt, without surrounding blanks.
        batch_size: answers at a time; it changes the speed, not the numbers (but for rounding).

    Raises:
        ValueError: if lengths differ, the batch size is below 1, or prompt and answer are longer than the model reads.
    """
    if not len(images) == len(prompts) == len(answers):
        raise InputError(
            f"got {len(images)} images, {len(prompts)} prompts and {len(answers)} answers; give as many of each."
        )
    prepare = predictor.prepare
    written = [prepare.answer_ids(answer) for answer in answers]
    lengths = [
        len(prepare.encode(prompt, prepare.sizes(as_list(own)), max_new_tokens=len(ids))) + len(ids)
        for prompt, own, ids in zip(prompts, images, written, strict=True)
    ]
    found: dict[int, Likelihood] = {}
    prepared = PreparedPrompts(prepare, prompts, images, max_new_tokens=1)
    encoded = EncodedImages(predictor.model, prepare.preprocessing)
    for batch in form_batches(lengths, batch_size, groups=prepared.groups()):
        samples = [prepared[index] for index in batch]
        found |= zip(batch, _measure(predictor, samples, [written[index] for index in batch], encoded), strict=True)
    return [found[index] for index in range(len(prompts))]


@torch.inference_mode()
def _measure(
    predictor: Predictor,
    samples: Sequence[Mapping[str, Any]],
    answers: Sequence[Sequence[int]],
    encoded: EncodedImages,
) -> list[Likelihood]:
    """Measure K tokens at most of B answers in one pass: padding stands on the left, so all end at the same place."""
    whole = [
        {**sample, "input_ids": torch.cat([sample["input_ids"], sample["input_ids"].new_tensor(ids)])}
        for sample, ids in zip(samples, answers, strict=True)
    ]
    model, joined = predictor.model, predictor.join(whole)
    batch = {name: joined[name].to(model.device, non_blocking=True) for name in ("input_ids", "attention_mask")}
    longest = max(1, *map(len, answers))
    # As `generate` counts: the first position that is no padding is 0.
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    # In front of each token of the answers: nowhere else are logits computed.
    fronts = torch.arange(-longest - 1, -1, device=model.device) + batch["input_ids"].shape[1]
    output = model(**batch, **encoded(joined), position_ids=positions, use_cache=False, logits_to_keep=fronts)
    logits = output.logits.float()  # (B, K, vocabulary)
    logits[..., predictor.prepare.image_token_id] = -torch.inf
    targets = batch["input_ids"][:, -longest:]
    counts = torch.tensor([len(ids) for ids in answers], device=model.device)
    is_answer = torch.arange(longest, device=model.device) >= longest - counts[:, None]
    of_targets = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    sums = of_targets.double().masked_fill(~is_answer, 0).sum(1).tolist()
    greedy = ((logits.argmax(-1) == targets) | ~is_answer).all(1).tolist()
    return [Likelihood(*own) for own in zip(sums, greedy, strict=True)]
