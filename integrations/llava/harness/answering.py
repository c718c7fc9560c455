"""What a harness asks, answered by one of our predictors: in groups that share their decoding, in the order asked."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tqdm.auto import tqdm

from integrations.llava.inference import Predictor, SamplingParams, answer_likelihoods, load_predictor

from .arguments import HarnessArguments, cut_answer, read_decoding

__all__ = ["HarnessAnswers", "HarnessQuestion"]

# So many batches' questions, with their images, are held at a time, and sorted by length.
_BATCHES = 32


@dataclass(frozen=True)
class HarnessQuestion:
    """A question of a harness.

    Attributes:
        images: PIL images or paths, none if there are none.
        prompt: a text, or turns; as a `Predictor` takes it.
        key: names the question, for the seed of sampling.
        decoding: a task's settings, see `read_decoding`.
        answer: that is measured, if one is.
    """

    images: Sequence[Any]
    prompt: Any
    key: str = ""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    answer: str = ""


class HarnessAnswers:
    """A checkpoint that answers; it is loaded at once, given back by `unload`, and loaded again if asked then.

    Raises:
        ValueError, FileNotFoundError: as `load_predictor`.
    """

    def __init__(self, arguments: HarnessArguments) -> None:
        self.arguments = arguments
        self._predictor: Predictor | None = None
        self.device = self.predictor.model.device
        # A question asked again, for several samples, has another key.
        self._times: Counter[str] = Counter()

    @property
    def predictor(self) -> Predictor:
        """The model, loaded."""
        if self._predictor is None:
            said = self.arguments
            self._predictor = load_predictor(
                said.pretrained, device=said.device, dtype=said.dtype, quantize=said.quantize, compile=said.compile
            )
        return self._predictor

    def unload(self) -> None:
        """Let go of the model's memory."""
        self._predictor = None

    def generate(self, questions: Iterable[HarnessQuestion], *, total: int, show_bar: bool | None = None) -> list[str]:
        """Answer questions; they are taken, with their images, as they are needed.

        An answer is at most as long as its task says, and as the model's positions allow.

        Raises:
            ValueError: if a setting of decoding is not read, an image cannot be, or a prompt does not fit.
        """
        return self._in_parts(questions, self._generate, total, show_bar)

    def measure(
        self, questions: Iterable[HarnessQuestion], *, total: int, show_bar: bool | None = None
    ) -> list[tuple[float, bool]]:
        """Tell of each question's answer the logarithm of its probability, and whether greedy decoding gives it."""
        return self._in_parts(questions, self._measure, total, show_bar)

    def _in_parts(self, questions: Iterable[HarnessQuestion], work: Any, total: int, show_bar: bool | None) -> Any:
        results: list[Any] = []
        size = _BATCHES * self.arguments.batch_size
        waiting: Iterator[HarnessQuestion] = iter(questions)
        disable = None if show_bar is None else not show_bar
        with tqdm(total=total, desc="answers", unit="question", disable=disable) as bar:
            while part := list(islice(waiting, size)):
                results += work(part)
                bar.update(len(part))
        return results

    def _measure(self, questions: Sequence[HarnessQuestion]) -> list[tuple[float, bool]]:
        measured = answer_likelihoods(
            self.predictor,
            [list(own.images) for own in questions],
            [own.prompt for own in questions],
            [own.answer for own in questions],
            batch_size=self.arguments.batch_size,
        )
        return [(own.log_probability, own.is_greedy) for own in measured]

    def _generate(self, questions: Sequence[HarnessQuestion]) -> list[str]:
        groups: dict[SamplingParams, list[int]] = {}
        ends: list[tuple[str, ...]] = []
        for index, own in enumerate(questions):
            sampling, until = read_decoding(own.decoding, self.arguments.max_new_tokens)
            groups.setdefault(self._fitting(own, sampling), []).append(index)
            ends.append(until)
        keys = [self._key(own.key) for own in questions]
        answers: dict[int, str] = {}
        for sampling, indices in groups.items():
            texts = self.predictor(
                [list(questions[index].images) for index in indices],
                [questions[index].prompt for index in indices],
                batch_size=self.arguments.batch_size,
                sampling=sampling,
                keys=[keys[index] for index in indices],
            )
            answers |= zip(indices, texts, strict=True)
        return [cut_answer(answers[index], until) for index, until in enumerate(ends)]

    def _fitting(self, question: HarnessQuestion, sampling: SamplingParams) -> SamplingParams:
        """Shorten the longest answer to the positions that the prompt leaves, if it leaves any."""
        prepare = self.predictor.prepare
        room = prepare.room(question.prompt, prepare.sizes(question.images))
        if room is None or room < 1 or room >= sampling.max_new_tokens:
            return sampling
        return dataclasses.replace(sampling, max_new_tokens=room)

    def _key(self, key: str) -> str:
        self._times[key] += 1
        return key if self._times[key] == 1 else f"{key} {self._times[key]}"
