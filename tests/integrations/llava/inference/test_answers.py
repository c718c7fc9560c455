"""An answer: decoded as asked, in a conversation, ended where the template ends it, streamed."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from integrations.llava.inference.predictor import Predictor, load_predictor
from integrations.llava.inference.sampling import SamplingParams, SeededSampling
from integrations.llava.inference.streaming import WholeTextStreamer, before_texts
from integrations.llava.prompts import get_template, render
from tests.integrations.llava.inference.answering_parts import PROMPTS, SAMPLED, save_run
from tests.integrations.llava.tiny_parts import human_and_gpt

# Sampling


def test_sampling_follows_the_seed(predictor: Predictor, pictures: list[Image.Image]) -> None:
    def ask(seed: int, *, prompts: int = 4) -> list[str]:
        sampling = dataclasses.replace(SAMPLED, seed=seed)
        return predictor(pictures[:prompts], ["What?"] * prompts, sampling=sampling)

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)
    assert ask(1, prompts=2) == ask(1)[:2]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(temperature=1.0), [0.5, 0.3, 0.2]),
        (SamplingParams(temperature=0.5), [25 / 38, 9 / 38, 4 / 38]),
        (SamplingParams(temperature=1.0, top_p=0.6), [5 / 8, 3 / 8, 0.0]),
    ],
)
def test_sampling_draws_from_the_distribution(sampling: SamplingParams, expected: list[float]) -> None:
    count = 4000
    scores = torch.tensor([0.5, 0.3, 0.2]).log().expand(count, 3)
    sampling = SeededSampling(sampling, [str(row) for row in range(count)], torch.device("cpu"))
    drawn = sampling(torch.zeros(count, 1, dtype=torch.long), scores).argmax(1).bincount(minlength=3) / count

    # Four standard deviations.
    torch.testing.assert_close(drawn, torch.tensor(expected), atol=4 * 0.5 / count**0.5, rtol=0)
    assert (drawn == 0).tolist() == [share == 0 for share in expected]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is too small"),
        ({"num_beams": 0}, "num_beams=0 is too small"),
        ({"temperature": -1.0}, "temperature=-1.0 is negative"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 is no probability"),
        ({"top_p": 0.9}, "top_p=0.9 needs sampling"),
        ({"num_beams": 2, "temperature": 1.0}, "exclude each other"),
    ],
)
def test_decoding_that_means_nothing_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_a_language_models_own_settings_neither_apply_nor_warn(
    run: Path, predictor: Predictor, pictures: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    expected = predictor(pictures[:1], ["What?"], max_new_tokens=8)
    vicuna = load_predictor(run)
    theirs = {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "max_length": 40, "repetition_penalty": 1.7}
    theirs |= {"no_repeat_ngram_size": 1, "min_length": 300, "min_new_tokens": 8, "encoder_repetition_penalty": 3.0}
    theirs |= {"suppress_tokens": list(range(300, 350)), "begin_suppress_tokens": list(range(350, 400))}
    theirs |= {"bad_words_ids": [[token] for token in range(260, 300)], "sequence_bias": [[[300], 50.0]]}
    theirs |= {"forced_bos_token_id": 251, "forced_eos_token_id": 252, "min_p": 0.5, "typical_p": 0.2, "top_k": 3}
    theirs |= {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "exponential_decay_length_penalty": (1, 9.0), "num_beams": 4}
    theirs |= {"length_penalty": 5.0, "early_stopping": True, "num_return_sequences": 2, "renormalize_logits": True}
    theirs |= {"guidance_scale": 2.0, "remove_invalid_values": True, "eos_token_id": 5, "use_cache": False}
    theirs |= {"return_dict_in_generate": True, "output_scores": True, "stop_strings": ["a"], "max_time": 0.001}
    for name, value in theirs.items():
        setattr(vicuna.model.generation_config, name, value)

    assert vicuna(pictures[:1], ["What?"], max_new_tokens=8) == expected
    assert not caplog.records


# Conversations


def test_a_conversation_is_read_as_training_writes_it(predictor: Predictor, pictures: list[Image.Image]) -> None:
    turns = human_and_gpt("<image>\nWhat number?", "It is one.", "Sure?", "Yes.", "<image>\nAnd this?")
    prepared = predictor.prepare(pictures[:2], turns)
    trained = render(
        [*turns, {"from": "gpt", "value": "Two."}],
        template=predictor.prepare.template,
        encoder=predictor.prepare.encoder,
        image_token_id=predictor.prepare.image_token_id,
        num_images=2,
    )
    ids = torch.tensor(trained.input_ids)
    asked = ids[: trained.labels.index(ids[-1].item(), -1) - len(predictor.prepare.encoder(" Two."))]
    expanded = asked.repeat_interleave(torch.where(asked == predictor.prepare.image_token_id, 16, 1))

    assert torch.equal(prepared["input_ids"], expanded)
    assert predictor([pictures[:2]], [turns], max_new_tokens=8)[0]


def test_images_without_tags_stand_in_front(predictor: Predictor, pictures: list[Image.Image]) -> None:
    plain = predictor.prepare(pictures[:2], human_and_gpt("What?", "One.", "Sure?"))
    tagged = predictor.prepare(pictures[:2], human_and_gpt("<image>\n<image>\nWhat?", "One.", "Sure?"))

    assert torch.equal(plain["input_ids"], tagged["input_ids"])


@pytest.mark.parametrize(
    ("num_images", "prompt", "message"),
    [
        (2, "<image> or what?", "has 1 <image> tags for 2 images"),
        (1, human_and_gpt("<image>\na", "b", "<image>\nc"), "has 2 <image> tags for 1 images"),
        (0, human_and_gpt("a", "b"), "has to end with the human's turn"),
        (0, [], "has to end with the human's turn"),
        (0, [*human_and_gpt("a"), *human_and_gpt("b")], "have to alternate"),
        (0, "word " * 600, "the model reads 512"),
    ],
)
def test_prompts_that_cannot_be_written_are_refused(
    predictor: Predictor, num_images: int, prompt: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.prepare.encode(prompt, [None] * num_images)


# The end of an answer


def test_an_answer_ends_with_the_templates_end_token(run: Path, pictures: list[Image.Image]) -> None:
    predictor = load_predictor(run)
    tokens: list[int] = []
    # A model that is made to say: word, end of sequence, word, word, …
    said = itertools.chain([300], [predictor.prepare.encoder.end], itertools.repeat(301))

    def say(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        tokens.append(next(said))
        return torch.nn.functional.one_hot(torch.tensor(tokens[-1]), logits.shape[-1]).float().expand(logits.shape)

    predictor.model.lm_head.register_forward_hook(say)
    word = predictor.processor.tokenizer.decode([300]).strip()

    assert predictor(pictures[:1], ["What?"], max_new_tokens=20) == [word]
    assert len(tokens) == 2


def test_a_template_without_end_token_ends_at_its_text(
    backbone_folder: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    predictor = load_predictor(save_run(tmp_path / "run", backbone_folder, template="plain"))
    break_id = predictor.processor.tokenizer.convert_tokens_to_ids("<0x0A>")
    said = itertools.chain([300, break_id], itertools.repeat(301))
    predictor.model.lm_head.register_forward_hook(
        lambda _, __, logits: (
            torch.nn.functional.one_hot(torch.tensor(next(said)), logits.shape[-1]).float().expand(logits.shape)
        )
    )

    assert predictor.prepare.template == get_template("plain")
    assert predictor(pictures[:1], [""], max_new_tokens=20) == [predictor.processor.tokenizer.decode([300]).strip()]
    assert next(said) == 301


# Stop strings

STOPS = ("END", "\n\nUSER:", "STOP")


@pytest.mark.parametrize("sampling", [SamplingParams(max_new_tokens=20), SAMPLED], ids=["greedy", "sampled"])
def test_answers_end_in_front_of_a_stop_string_alone_in_batches_and_streamed(
    predictor: Predictor, mixture: list[Any], sampling: SamplingParams
) -> None:
    keys = ["0"] * len(PROMPTS)  # that of a stream
    whole = predictor(mixture, PROMPTS, sampling=sampling, keys=keys)
    # From inside words and over the blank between two, of some answers; and one that none has.
    stops = [*[answer[3:8] for answer in whole if len(answer) > 12][:3], "nowhere"]
    stopping = dataclasses.replace(sampling, stop=tuple(stops))
    expected = [re.split("|".join(map(re.escape, stops)), answer)[0].strip() for answer in whole]

    assert sum(one != other for one, other in zip(whole, expected, strict=True)) >= 3
    for size in (1, 3, 8):
        assert predictor(mixture, PROMPTS, sampling=stopping, keys=keys, batch_size=size) == expected
    for images, prompt, answer in zip(mixture, PROMPTS, expected, strict=True):
        assert "".join(predictor.stream(images, prompt, sampling=stopping)) == answer


def test_a_stop_string_ends_the_generation_and_the_prompt_does_not(
    predictor: Predictor, pictures: list[Image.Image]
) -> None:
    whole = predictor(pictures[:1], ["What?"], max_new_tokens=20)[0]
    steps: list[int] = []
    hook = predictor.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    early = predictor(pictures[:1], ["What?"], sampling=SamplingParams(20, stop=(whole[4:6],)))
    hook.remove()

    assert early == [whole[:4].strip()]
    assert len(steps) < 10
    # "ASSISTANT:" ends the prompt, and no answer.
    assert predictor(pictures[:1], ["What?"], sampling=SamplingParams(20, stop=("T:", f":{whole[:2]}"))) == [whole]


def test_no_part_of_a_stop_string_is_ever_shown(predictor: Predictor) -> None:
    tokenizer = predictor.processor.tokenizer
    streamer = WholeTextStreamer(tokenizer, lambda ids: before_texts("".join(map(chr, ids)), STOPS).strip(), STOPS)
    streamer.next_tokens_are_prompt = False
    shown = []
    for letter in "a STO b END c\n\nUSER: d":
        streamer.put(torch.tensor([ord(letter)]))
        while not streamer.text_queue.empty():
            shown.append(streamer.text_queue.get())
    assert "".join(shown) == "a STO b"
    streamer.end()
    assert streamer.text_queue.get() == ""  # nothing was held back


@pytest.mark.parametrize("stop", ["text", ("",), (1,)])
def test_what_is_no_stop_string_is_refused(stop: Any) -> None:
    with pytest.raises(ValueError, match="is no list of texts; give texts of at least one character each"):
        SamplingParams(stop=stop)


def test_settings_without_stop_strings_are_those_of_before() -> None:
    assert "stop" not in SamplingParams().to_dict()
    assert SamplingParams(stop=["a"]).to_dict()["stop"] == ["a"]  # type: ignore[arg-type]


# Streaming


@pytest.mark.parametrize("sampling", [SamplingParams(max_new_tokens=20), SAMPLED], ids=["greedy", "sampled"])
def test_streamed_pieces_joined_are_the_answer(
    predictor: Predictor, mixture: list[Any], sampling: SamplingParams
) -> None:
    for images, prompt in zip(mixture, PROMPTS, strict=True):
        pieces = list(predictor.stream(images, prompt, sampling=sampling))

        assert len(pieces) > 1
        assert "".join(pieces) == predictor([images], [prompt], sampling=sampling)[0]


def test_closing_the_stream_stops_the_generation(predictor: Predictor) -> None:
    steps: list[int] = []
    hook = predictor.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    stream = predictor.stream(None, "What?", max_new_tokens=300)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    hook.remove()

    assert len(steps) < 300


def test_an_error_while_streaming_is_raised(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PreTrainedModel, "device", property(fail))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(predictor.stream(None, "What?"))


def test_the_old_name_of_sampling_warns(predictor: Predictor) -> None:
    with pytest.warns(DeprecationWarning, match="decoding is now called sampling") as warned:
        answers = predictor([None], ["What?"], decoding=SAMPLED)
    assert warned[0].filename == __file__
    assert answers == predictor([None], ["What?"], sampling=SAMPLED)


def test_beams_are_not_streamed(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="num_beams=2: beams cannot be streamed"):
        predictor.stream(None, "What?", sampling=SamplingParams(num_beams=2))
