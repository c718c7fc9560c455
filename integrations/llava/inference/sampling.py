"""Decoding of answers: greedy, with beams, or sampled so that a question's answer depends on its seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from layerfuse.errors import InputError

__all__ = ["SamplingParams", "SeededSampling", "generate_settings"]


# Settings of `generate` that mean nothing else than "as the model says" and cannot be None.
_NEUTRAL = {
    "do_sample": False,
    "early_stopping": False,
    "length_penalty": 1.0,
    "min_length": 0,
    "num_return_sequences": 1,
    "output_scores": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "use_cache": True,
}


@dataclass(frozen=True)
class SamplingParams:
    """Settings of decoding; by default greedy.

    Attributes:
        max_new_tokens: an answer's longest length.
        temperature: 0 takes the likeliest token; more than 0 samples from the distribution at that temperature.
        top_p: sample among the likeliest tokens that together have this probability.
        num_beams: width of beam search; 1 is none.
        seed: of sampling.
        stop: texts at the first of which an answer ends, without it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop={self.stop!r} is no list of texts; give texts of at least one character each.")
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is too small; give at least 1.")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature} is negative; give 0 (greedy) or more (sampling).")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is no probability; give more than 0 and at most 1.")
        if self.top_p < 1 and not self.temperature:
            raise InputError(f"top_p={self.top_p} needs sampling; give a temperature above 0 with it.")
        if self.num_beams > 1 and self.temperature:
            raise InputError(
                f"num_beams={self.num_beams} and temperature={self.temperature} exclude each other: beam search looks "
                "for the likeliest answer. Set num_beams to 1 or temperature to 0."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values by name; without texts to stop at, none are named, as in files of answers from before."""
        values = asdict(self)
        stop = list(values.pop("stop"))
        return values | ({"stop": stop} if stop else {})


def generate_settings(
    sampling: SamplingParams, *, prompt_length: int, ends: Sequence[int], padding: int, forbidden: Sequence[int]
) -> dict[str, Any]:
    """Write out every setting of transformers' `generate`, so that none of a language model's own config acts.

    `generate` takes each setting that is not given, or is None in a `GenerationConfig`, from the model's own config
    (Qwen2.5's has a repetition penalty); only arguments, None included, go before it. Draws are made by
    `SeededSampling`. `prompt_length` counts padding; without the forbidden tokens, probabilities of the others keep
    their proportions.
    """
    settings: dict[str, Any] = dict.fromkeys(GenerationConfig().to_dict().keys() - {"transformers_version"})
    return {
        **settings,
        **_NEUTRAL,
        # Not `max_new_tokens`: with the default `max_length`, transformers would warn in every batch.
        "max_length": prompt_length + sampling.max_new_tokens,
        "num_beams": sampling.num_beams,
        "eos_token_id": [*ends],
        "pad_token_id": padding,
        "suppress_tokens": list(forbidden) or None,
        "renormalize_logits": sampling.num_beams > 1,
    }


class SeededSampling(LogitsProcessor):
    """Makes greedy search sample: the likeliest token of perturbed scores is a draw (Gumbel-max trick).

    Every row draws from the seed and its key alone. So an answer depends neither on the batch it was decoded in, nor on
    other rows, nor on earlier answers, as it would with one generator for all. Other devices draw other numbers.
    """

    def __init__(self, sampling: SamplingParams, keys: Sequence[str], device: torch.device) -> None:
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        hashes = [hashlib.sha256(f"{sampling.seed} {key}".encode()).digest() for key in keys]
        seeds = [int.from_bytes(digits[:7], "big") for digits in hashes]
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Perturb (B, vocabulary) scores of the next token."""
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        noise = [scores.new_empty(scores.shape[1]).exponential_(generator=own) for own in self._generators]
        return scores - torch.stack(noise).log()
