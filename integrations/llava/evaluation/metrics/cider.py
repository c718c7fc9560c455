"""CIDEr: how much a caption says what people say of the same picture, rare words counting most.

Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015; this is CIDEr-D as COCO's scorers
compute it. Each caption is a vector of its n-grams, n = 1..4, weighed by tf-idf: how often it stands there, times
log(number of pictures) - log(number of pictures whose references have it). The score of a caption is 10 times the mean,
over n and over references, of

    sum of min(candidate, reference) * reference / (|candidate| |reference|) * exp(-(difference of lengths)² / (2 * 6²))

An oddity that is kept: a length is a number of pairs of words, one less than that of words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .ptb_tokens import caption_words

__all__ = ["CiderCorpus"]

_LONGEST = 4
_SIGMA = 6.0

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """Weights of a caption's n-grams and their norms, one entry per n, and its length in pairs of words."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


class CiderCorpus:
    """The references of all pictures: which n-grams are rare among them.

    Args:
        references: captions of each picture, one or more.
    """

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        self._counts: dict[str, Counter[Ngram]] = {}
        self._frequency: Counter[Ngram] = Counter()
        num_pictures = 0
        for captions in references:
            num_pictures += 1
            self._frequency.update({ngram for caption in captions for ngram in self._ngrams(caption)})
        self._log_pictures = math.log(num_pictures) if num_pictures else 0.0

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Score a caption, 0 to 10, against its picture's references, which are among those of the corpus."""
        candidate = self._vector(_count(caption))
        similar = [_similarity(candidate, self._vector(self._ngrams(each))) for each in references]
        return 10 * sum(similar) / len(similar)

    def _ngrams(self, reference: str) -> Counter[Ngram]:
        if reference not in self._counts:
            self._counts[reference] = _count(reference)
        return self._counts[reference]

    def _vector(self, counts: Counter[Ngram]) -> _Vector:
        weights: list[dict[Ngram, float]] = [{} for _ in range(_LONGEST)]
        for ngram, count in counts.items():
            rarity = self._log_pictures - math.log(max(1, self._frequency[ngram]))
            weights[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(weight**2 for weight in own.values())) for own in weights]
        return _Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _count(caption: str) -> Counter[Ngram]:
    words = caption_words(caption)
    return Counter(tuple(words[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(words) - n + 1))


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * _SIGMA**2))
    total = 0.0
    for own, other, own_norm, other_norm in zip(
        candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True
    ):
        if own_norm and other_norm:
            shared = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in own.items() if ngram in other)
            total += shared / (own_norm * other_norm)
    return penalty * total / _LONGEST
