"""Answers to a harness are those of our own loop: in order, whatever the batch, each with its own settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from integrations.llava.harness import answering
from integrations.llava.harness.answering import HarnessAnswers, HarnessQuestion
from integrations.llava.harness.arguments import HarnessArguments
from integrations.llava.inference.likelihood import answer_likelihoods
from integrations.llava.inference.predictor import Predictor
from integrations.llava.inference.sampling import SamplingParams
from tests.integrations.llava.inference.answering_parts import PROMPTS

LENGTHS = (12, 4, 12, 7)


@pytest.fixture(scope="module")
def answers(run: Path) -> HarnessAnswers:
    return HarnessAnswers(HarnessArguments(str(run), device="cpu", batch_size=3, max_new_tokens=12))


def questions(mixture: list[Any], **decoding: Any) -> list[HarnessQuestion]:
    return [
        HarnessQuestion(
            images if isinstance(images, list) else [] if images is None else [images], prompt, str(index), decoding
        )
        for index, (images, prompt) in enumerate(zip(mixture, PROMPTS, strict=True))
    ]


def test_answers_are_those_of_our_own_loop(
    answers: HarnessAnswers, predictor: Predictor, mixture: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_BATCHES", 1)  # three questions are held at a time
    expected = predictor(mixture, PROMPTS, max_new_tokens=12)
    asked = iter(questions(mixture, until=["\n\n"]))
    assert answers.generate(asked, total=len(PROMPTS), show_bar=False) == expected
    assert len(set(expected)) > 4


def test_every_question_has_its_own_settings(answers: HarnessAnswers, predictor: Predictor, mixture: list[Any]) -> None:
    asked = questions(mixture)
    settings = [{"max_new_tokens": LENGTHS[index % 4]} for index in range(len(asked))]
    own = [HarnessQuestion(q.images, q.prompt, q.key, s) for q, s in zip(asked, settings, strict=True)]
    expected = [
        predictor([images], [prompt], max_new_tokens=LENGTHS[index % 4])[0]
        for index, (images, prompt) in enumerate(zip(mixture, PROMPTS, strict=True))
    ]
    assert answers.generate(own, total=len(own), show_bar=False) == expected


def test_an_answer_is_cut_where_its_task_ends_it(answers: HarnessAnswers, mixture: list[Any]) -> None:
    whole = answers.generate(questions(mixture), total=8, show_bar=False)
    cut = answers.generate(questions(mixture, until=["is", "ss"]), total=8, show_bar=False)
    assert cut == [min((own.split("is")[0], own.split("ss")[0]), key=len).strip() for own in whole]
    assert cut != whole


def test_samples_depend_on_the_question_and_on_how_often_it_was_asked(run: Path, pictures: list[Image.Image]) -> None:
    arguments = HarnessArguments(str(run), device="cpu", batch_size=2)
    decoding = {"temperature": 1.0, "max_new_tokens": 12}
    one, two = (HarnessQuestion([pictures[0]], "What?", key, decoding) for key in ("task/test/1", "task/test/2"))
    first = HarnessAnswers(arguments).generate([one, two, one], total=3, show_bar=False)
    assert len(set(first)) == 3
    assert HarnessAnswers(arguments).generate([two, one, one], total=3, show_bar=False) == [
        first[1],
        first[0],
        first[2],
    ]


def test_a_long_prompt_leaves_a_shorter_answer(answers: HarnessAnswers, pictures: list[Image.Image]) -> None:
    room = answers.predictor.prepare.room("What?", answers.predictor.prepare.sizes(pictures[:1]))
    assert room is not None
    asked = HarnessQuestion(pictures[:1], "What?", decoding={"max_new_tokens": 4096})
    assert answers._fitting(asked, SamplingParams(4096)) == SamplingParams(room)
    assert answers._fitting(asked, SamplingParams(5)) == SamplingParams(5)
    with pytest.raises(ValueError, match="the model reads 512; shorten it"):
        answers.generate([HarnessQuestion([], "number " * 900)], total=1, show_bar=False)


def test_likelihoods_are_ours_also_after_the_model_was_let_go(
    run: Path, predictor: Predictor, pictures: list[Image.Image], tmp_path: Path
) -> None:
    pictures[1].save(tmp_path / "b.png")
    answers = HarnessAnswers(HarnessArguments(str(run), device="cpu", batch_size=2))
    asked = [HarnessQuestion([tmp_path / "b.png"], "What?", answer=option) for option in ("one", "two", "on a wall")]
    expected = answer_likelihoods(predictor, [pictures[1]] * 3, ["What?"] * 3, ["one", "two", "on a wall"])
    for _ in range(2):
        found = answers.measure(asked, total=3, show_bar=False)
        assert [number for number, _ in found] == pytest.approx([own.log_probability for own in expected], abs=1e-3)
        assert [greedy for _, greedy in found] == [own.is_greedy for own in expected]
        answers.unload()
