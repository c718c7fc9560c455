"""Templates, label spans, and text that is never a control token."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from integrations.llava.prompts import (
    IGNORE_INDEX,
    TEMPLATES,
    Rendered,
    Template,
    TextEncoder,
    chat_template,
    get_template,
    render,
)
from integrations.llava.prompts import encoder as text_encoder
from tests.integrations.llava.tiny_parts import human_and_gpt, make_tokenizer

IMAGE = 10_000
_TOKENIZERS = {kind: make_tokenizer(kind) for kind in ("llama", "bytes")}
for _tokenizer in _TOKENIZERS.values():
    _tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "[PAD]"]})
_ENCODERS = {kind: TextEncoder(tokenizer) for kind, tokenizer in _TOKENIZERS.items()}
_SPELLINGS = sorted({token for tokenizer in _TOKENIZERS.values() for token in tokenizer.all_special_tokens})

texts = st.one_of(
    st.sampled_from(
        ["</s>", "a </s> b", "USER: x ASSISTANT: y", "ASSISTANT:", "<s>", "<unk>", " ", "\n", "two  blanks "]
    ),
    st.text(st.characters(codec="utf-8"), max_size=20),
).filter(lambda text: "<image>" not in text)


def rendered(
    messages: list[dict[str, str]], template: str = "v1", kind: str = "llama", num_images: int = 0
) -> Rendered:
    return render(
        messages, template=TEMPLATES[template], encoder=_ENCODERS[kind], image_token_id=IMAGE, num_images=num_images
    )


@given(turns=st.lists(texts, min_size=1, max_size=3), kind=st.sampled_from(sorted(_ENCODERS)), with_image=st.booleans())
def test_labels_are_exactly_the_answers_and_their_ends(turns: list[str], kind: str, with_image: bool) -> None:
    encoder = _ENCODERS[kind]
    questions = [("<image>\n" if with_image and not index else "") + f"q{index}" for index in range(len(turns))]
    messages = human_and_gpt(*(text for pair in zip(questions, turns, strict=True) for text in pair))
    out = rendered(messages, kind=kind, num_images=int(with_image))

    expected: list[int] = []
    for index, answer in enumerate(turns):
        # As in the published code, an empty answer in the middle is not supervised.
        if answer or index == len(turns) - 1:
            expected += [*encoder(f" {answer}" if answer else ""), encoder.end]
    assert [label for label in out.labels if label != IGNORE_INDEX] == expected
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(out.input_ids, out.labels, strict=True))


@given(
    pieces=st.lists(st.sampled_from(_SPELLINGS) | st.text(max_size=5), max_size=6),
    role=st.sampled_from(["question", "answer", "both"]),
    kind=st.sampled_from(sorted(_ENCODERS)),
)
def test_no_special_token_is_ever_read_out_of_a_message(pieces: list[str], role: str, kind: str) -> None:
    tokenizer, encoder = _TOKENIZERS[kind], _ENCODERS[kind]
    typed = "".join(pieces)
    question, answer = (typed if role in (part, "both") else "x" for part in ("question", "answer"))
    # With one image, tags in a question are the image's place.
    out = rendered(human_and_gpt(question, answer), kind=kind, num_images=0)

    unknown = tokenizer.unk_token_id
    special = [token for token in out.input_ids if token in tokenizer.all_special_ids and token != unknown]
    assert special == [*encoder.begin, encoder.end]
    assert out.input_ids[-1] == encoder.end


def test_image_tag_typed_in_an_answer_is_text() -> None:
    out = rendered(human_and_gpt("<image>\nName the tag.", "It is <image>."), num_images=1)

    assert out.input_ids.count(IMAGE) == 1
    assert out.prompt.endswith("ASSISTANT: It is <image>.</s>")


def test_image_tag_is_text_when_the_sample_has_no_image() -> None:
    assert IMAGE not in rendered(human_and_gpt("<image>\nWhat?", "Nothing.")).input_ids


def test_one_image_moves_to_the_front_of_its_message() -> None:
    out = rendered(human_and_gpt("Look at <image> and <image> now.", "Yes."), num_images=1)

    assert "USER: <image>\nLook at  and  now. ASSISTANT: Yes.</s>" in out.prompt
    assert out.input_ids.count(IMAGE) == 1


def test_several_images_keep_their_places() -> None:
    out = rendered(human_and_gpt("Compare <image> with <image>.", "Equal."), num_images=2)

    assert "USER: Compare <image> with <image>. ASSISTANT:" in out.prompt
    assert out.input_ids.count(IMAGE) == 2


def test_plain_supervises_caption_and_line_end_only() -> None:
    out = rendered(human_and_gpt("<image>\nDescribe.", "a boat"), "plain", num_images=1)

    assert out.prompt == "<image>a boat\n"
    assert out.input_ids[:2] == [1, IMAGE]
    assert out.labels[:2] == [IGNORE_INDEX] * 2
    assert out.labels[2:] == out.input_ids[2:]


def test_brief_is_v1_without_system_text() -> None:
    messages = human_and_gpt("Hello", "Hi")

    assert rendered(messages).prompt == f"{TEMPLATES['v1'].system} {rendered(messages, 'brief').prompt}"


def test_leading_turn_of_the_model_is_left_out() -> None:
    messages = human_and_gpt("Hello", "Hi")

    assert rendered([{"from": "gpt", "value": "Welcome"}, *messages]) == rendered(messages)


def test_turns_that_do_not_alternate_are_refused() -> None:
    with pytest.raises(ValueError, match=r"turns of a conversation are \['human', 'human'\]"):
        rendered([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}])


@pytest.mark.parametrize("num_images", [0, 1])
def test_plain_refuses_what_is_no_caption(num_images: int) -> None:
    with pytest.raises(ValueError, match="writes one caption behind its image"):
        rendered(
            human_and_gpt("q", "a", "q", "a") if num_images else human_and_gpt("q", "a"), "plain", num_images=num_images
        )


def test_unknown_template_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="'plian' is unknown; did you mean 'plain'"):
        get_template("plian")


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        eos_token_id = 2

    with pytest.raises(ValueError, match="no fast implementation"):
        TextEncoder(Slow())  # type: ignore[arg-type]


def test_tokenizer_without_end_is_refused() -> None:
    tokenizer = make_tokenizer("bytes")
    tokenizer.eos_token = None

    with pytest.raises(ValueError, match="no eos_token"):
        TextEncoder(tokenizer)


def test_tokenizer_that_spells_control_tokens_as_text_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>"))

    with pytest.raises(ValueError, match="reads a control token out of the plain text"):
        encoder("a </s> a")


@pytest.mark.parametrize("template", ["v1", "brief"])
def test_chat_template_gives_the_ids_of_render(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    messages = human_and_gpt("<image>\nWhat number is it?", "It is one.", "Sure?", "Yes.")
    parts = [{"type": "image"}, {"type": "text", "text": "What number is it?"}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "It is one."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    jinja = chat_template(TEMPLATES[template], tokenizer)
    encoder = TextEncoder(tokenizer)

    for count in (1, 2, 3, 4):
        text = tokenizer.apply_chat_template(
            chat[:count], chat_template=jinja, tokenize=False, add_generation_prompt=count % 2 == 1
        )
        out = render(
            messages[:count],
            template=TEMPLATES[template],
            encoder=encoder,
            image_token_id=image,
            num_images=1,
            answer_next=count % 2 == 1,
        )
        assert tokenizer(text).input_ids == out.input_ids


def test_chat_template_of_plain_writes_the_image_alone() -> None:
    tokenizer = make_tokenizer("llama")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}]
    jinja = chat_template(TEMPLATES["plain"], tokenizer)

    assert tokenizer.apply_chat_template(chat, chat_template=jinja, tokenize=False) == "<image>"


def test_template_survives_a_dict() -> None:
    for template in TEMPLATES.values():
        assert Template.from_dict(json.loads(json.dumps(template.to_dict()))) == template


# Long texts


@pytest.mark.parametrize("kind", sorted(_ENCODERS))
@pytest.mark.parametrize("at_start", [False, True])
@given(words=st.lists(texts, min_size=1, max_size=40), at_least=st.integers(0, 60))
def test_the_first_ids_of_a_long_text_are_those_of_the_whole(
    kind: str, at_start: bool, words: list[str], at_least: int
) -> None:
    encoder, text = _ENCODERS[kind], " ".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoder, "LONG_TEXT", 1)
        patch.setattr(text_encoder, "_CHARACTERS", 1)
        first = encoder(text, at_start=at_start, at_least=at_least)
    whole = encoder(text, at_start=at_start)

    assert first == whole[: len(first)]
    assert len(first) >= min(at_least, len(whole))


def test_of_a_long_text_only_what_is_wanted_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen = TextEncoder(make_tokenizer("llama")), []
    pieces = encoder._pieces
    monkeypatch.setattr(
        encoder,
        "_pieces",
        SimpleNamespace(encode=lambda text: seen.append(len(text)) or pieces.encode(text), get_vocab=pieces.get_vocab),
    )
    answer = "the number of boats is one " * 40_000
    out = render(
        human_and_gpt("<image> first, then <image>", answer, "and <image>?", "no"),
        template=TEMPLATES["v1"],
        encoder=encoder,
        image_token_id=IMAGE,
        num_images=3,
        max_length=2048,
    )

    assert max(seen) < 70_000
    assert out.is_cut
    assert out.input_ids.count(IMAGE) == 3
    assert out.input_ids.index(IMAGE) < 2048 < len(out.input_ids)
    assert out.prompt.count("boats") == 40_000


def test_a_vocabulary_with_tokens_over_words_is_used_on_whole_texts() -> None:
    """A token for "of the": cut between these words, the ids would be others."""
    vocabulary = {"<s>": 0, "</s>": 1, "o": 2, "f": 3, "▁": 4, "of": 5, "of▁": 6}
    merges = [("o", "f"), ("of", "▁")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))
    text = "of of " * 20_000

    assert encoder(text, at_least=3) == encoder(text) == [6] * 40_000


def test_half_a_character_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"the text 'a \\ud83d' holds half of a character .* write it whole"):
        _ENCODERS["llama"]("a \ud83d")
