"""What a conversation remembers beside its words: encoded images, keys and values; its answers stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.config import InjectionConfig
from integrations.llava.inference import Conversation
from integrations.llava.inference.predictor import Predictor, load_predictor
from integrations.llava.inference.sampling import SamplingParams
from tests.integrations.llava.inference.answering_parts import save_run
from tests.integrations.llava.tiny_parts import human_and_gpt

SHORT = SamplingParams(max_new_tokens=8)

KINDS: dict[str, dict[str, Any]] = {
    "mmfuser": {},
    "text_gated": {"fuser": "text_gated", "fuser_options": {"condition_channels": 32, "groups": 2}},
    "injection": {"injection": InjectionConfig(pairs=((1, 0), (4, 1)))},
    "anyres": {"pinpoints": ((32, 64), (64, 32))},
}


@pytest.fixture(scope="module", params=KINDS)
def asked(request: pytest.FixtureRequest, backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A predictor of each kind of model."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return load_predictor(save_run(folder, backbone_folder, positions=1024, **KINDS[request.param]))


@contextmanager
def watched(predictor: Predictor) -> Iterator[tuple[list[int], list[int]]]:
    """Numbers of tiles that the backbone is given in each call, and of positions that the language model is."""
    tiles: list[int] = []
    positions: list[int] = []
    inner = predictor.model.model
    hooks = [
        inner.vision_tower.register_forward_pre_hook(lambda _, given: tiles.append(len(given[0]))),
        inner.language_model.register_forward_pre_hook(
            lambda _, __, given: positions.append(given["inputs_embeds"].shape[1]), with_kwargs=True
        ),
    ]
    try:
        yield tiles, positions
    finally:
        for hook in hooks:
            hook.remove()


def say(conversation: Conversation, text: str, *shown: Image.Image) -> str:
    conversation.shown = [*shown]
    return "".join(conversation.say(text))


def anew(conversation: Conversation) -> str:
    """The last answer, by a model that reads everything at once."""
    *messages, last = conversation.messages
    (answer,) = conversation.predictor([conversation.images], [messages], max_new_tokens=8)
    assert last["value"] == answer
    return answer


TURNS: list[tuple[str, tuple[int, ...]]] = [
    ("What number?", (7,)),
    ("Sure?", ()),
    ("<image> or <image>?", (1, 7)),
    ("What is it?", ()),
    ("And this?", (2,)),
]


@pytest.mark.parametrize("compile", [False, True], ids=["growing", "fixed"])
def test_answers_are_those_of_reading_all_anew_and_images_are_encoded_once(
    compile: bool, asked: Predictor, pictures: list[Image.Image]
) -> None:
    predictor = Predictor(asked.model, asked.processor, compile=compile)
    conversation = Conversation(predictor, SHORT)
    fresh = predictor.prepare.with_condition  # where it is asked about again, a picture is another image
    counts = predictor.prepare.layout
    for turn, (text, places) in enumerate(TURNS):
        with watched(predictor) as (tiles, positions):
            say(conversation, text, *(pictures[place] for place in places))
        new = [place for place in places if fresh or place not in (7,) or turn == 0]
        sizes = predictor.prepare.sizes([pictures[place] for place in new])
        assert sum(tiles) == sum(counts.num_tiles(size) for size in sizes)
        whole = len(predictor.prepare.encode(conversation.messages[:-1], predictor.prepare.sizes(conversation.images)))
        if turn:
            # Its own words and images, and what ends the answer before.
            own = sum(counts.num_tokens(size) for size in predictor.prepare.sizes([pictures[p] for p in places]))
            assert positions[0] < own + 60 < whole
        anew(conversation)
    assert len({turn["value"] for turn in conversation.messages[1::2]}) > 2


def edit_an_answer(conversation: Conversation, _: Any) -> None:
    conversation.messages[3] = {"from": "gpt", "value": "Another answer."}


def edit_a_question(conversation: Conversation, _: Any) -> None:
    conversation.messages[0] = {"from": "human", "value": "<image>\nWhat wall is this?"}


def replace_an_image(conversation: Conversation, pictures: list[Image.Image]) -> None:
    conversation.images[0] = pictures[5]


def fail(conversation: Conversation, _: Any) -> None:
    """The answer breaks off in the middle of the language model's work."""
    done: list[int] = []

    def stop(*_: Any) -> None:
        done.append(1)
        if len(done) == 3:
            raise RuntimeError("of the device")

    hook = conversation.predictor.model.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="of the device"):
        say(conversation, "Who?")
    hook.remove()


def close_early(conversation: Conversation, _: Any) -> None:
    pieces = conversation.say("Who?")
    next(pieces)
    pieces.close()


def turn_back(conversation: Conversation, _: Any) -> None:
    del conversation.messages[2:]


@pytest.mark.parametrize("happens", [edit_an_answer, edit_a_question, replace_an_image, fail, close_early, turn_back])
@pytest.mark.parametrize("compile", [False, True], ids=["growing", "fixed"])
def test_whatever_happens_between_turns_answers_are_those_of_reading_all_anew(
    compile: bool, happens: Callable[[Conversation, Any], None], predictor: Predictor, pictures: list[Image.Image]
) -> None:
    conversation = Conversation(Predictor(predictor.model, predictor.processor, compile=compile), SHORT)
    say(conversation, "What number?", pictures[0])
    say(conversation, "Sure?")
    happens(conversation, pictures)
    say(conversation, "And now?")
    anew(conversation)


def test_a_window_that_forgets_is_read_on_or_anew(predictor: Predictor, pictures: list[Image.Image]) -> None:
    """Mistral's attention looks at the last positions only, and cannot be taken back behind them."""
    from transformers import MistralConfig, MistralForCausalLM

    from integrations.llava.modeling.build import build_model

    torch.manual_seed(0)
    parts, text = predictor.model.model, predictor.model.config.text_config
    fields = {name: getattr(text, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = MistralConfig(
        **fields, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=24
    )
    config.initializer_range = 0.2
    model = build_model(
        parts.vision_tower.backbone,
        parts.fuser,
        MistralForCausalLM(config),
        image_token_id=predictor.model.config.image_token_index,
        prompt_template=predictor.model.config.prompt_template,
    )
    conversation = Conversation(Predictor(model, predictor.processor), SHORT)
    say(conversation, "What number?", pictures[0])
    anew(conversation)
    say(conversation, "Sure?")
    anew(conversation)
    edit_an_answer(conversation, pictures)
    say(conversation, "And now?")
    anew(conversation)


def test_a_prompt_that_ends_with_its_image_is_asked_again(
    backbone_folder: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """As templates of captions have it: there is no position behind the image to begin at."""
    captioning = load_predictor(save_run(tmp_path / "run", backbone_folder, template="plain"))
    memory = captioning.new_memory()
    first, again = ("".join(captioning.stream(pictures[0], "", max_new_tokens=6, memory=memory)) for _ in range(2))

    assert first == again == captioning([pictures[0]], [""], max_new_tokens=6)[0]


def test_without_a_memory_every_image_is_encoded_again(predictor: Predictor, pictures: list[Image.Image]) -> None:
    """So that counting encoded images tells whether one was remembered."""
    with watched(predictor) as (tiles, _):
        for messages in (human_and_gpt("What?"), human_and_gpt("What?", "One.", "Sure?")):
            list(predictor.stream(pictures[0], messages, max_new_tokens=2))

    assert tiles == [1, 1]
