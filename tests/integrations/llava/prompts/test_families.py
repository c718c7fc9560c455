"""Templates of families of language models, held against what these are published with."""

from __future__ import annotations

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from integrations.llava.prompts import (
    IGNORE_INDEX,
    TEMPLATES,
    TOKENIZER,
    Template,
    TextEncoder,
    chat_template,
    find_template,
    misfits,
    render,
    template_of,
)
from tests.integrations.llava.prompts.published_templates import PUBLISHED, family_tokenizer
from tests.integrations.llava.tiny_parts import human_and_gpt

IMAGE = 10_000
# Each family by our template of its name, and by the one made of its tokenizer's chat template.
BOTH = [(name, own.family or "") for name, own in PUBLISHED.items() if own.family]
BOTH += [(name, TOKENIZER) for name in PUBLISHED]
QUESTIONS_AND_ANSWERS = ("What is it?", "A boat.", "  And what\nelse? ", " Water,\n\nand\ta sky. ", "Sure?", "Yes")
SYSTEM = "Answer in one word."
# No thoughts, and Llama's day where there is no clock.
OFF = {"enable_thinking": False, "date_string": "26 Jul 2024"}


def as_chat(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in messages]


def published_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """What the family's own template writes, up to the last answer's end."""
    text: str = tokenizer.apply_chat_template(
        as_chat(messages), tokenize=False, add_generation_prompt=messages[-1]["from"] == "human", **OFF
    )
    return text


def conversations(name: str, template: Template) -> list[list[dict[str, str]]]:
    """One to six turns, also behind a system turn where the template knows it."""
    turns = human_and_gpt(*QUESTIONS_AND_ANSWERS)
    found = [turns[:count] for count in (1, 2, 3, 6)]
    if template.takes_system:
        # Mistral's source writes it into the last question, and nowhere where an answer follows.
        counts = (1,) if name == "mistral" else (1, 2, 6)
        found += [[{"from": "system", "value": SYSTEM}, *turns[:count]] for count in counts]
    return found


@pytest.mark.parametrize(("name", "asked"), BOTH)
def test_a_family_is_written_as_it_is_published(name: str, asked: str) -> None:
    own = PUBLISHED[name]
    tokenizer = family_tokenizer(own)
    template = find_template(asked, tokenizer)
    encoder = TextEncoder(tokenizer, template.control_tokens)
    compared = 0
    for messages in conversations(name, template):
        answer_next = messages[-1]["from"] == "human"
        out = render(
            messages, template=template, encoder=encoder, image_token_id=IMAGE, num_images=0, answer_next=answer_next
        )
        text = published_text(tokenizer, messages)
        assert text.startswith(out.prompt)
        # What stands behind the last answer's end is nothing that a model learns or reads.
        assert text[len(out.prompt) :] in ("", template.after_answer, f"{template.after_answer}{own.eos}")
        ids = tokenizer.apply_chat_template(
            as_chat(messages), add_generation_prompt=answer_next, return_dict=False, **OFF
        )
        begin = [] if own.bos and text.startswith(own.bos) else encoder.begin
        assert [*begin, *ids][: len(out.input_ids)] == out.input_ids
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize(("name", "asked"), BOTH)
def test_labels_are_the_answers_and_their_end(name: str, asked: str) -> None:
    """The places are looked for in the text that the family's own template writes."""
    own = PUBLISHED[name]
    tokenizer = family_tokenizer(own)
    template = find_template(asked, tokenizer)
    encoder = TextEncoder(tokenizer, template.control_tokens)
    messages = human_and_gpt(*QUESTIONS_AND_ANSWERS)
    out = render(messages, template=template, encoder=encoder, image_token_id=IMAGE, num_images=0)
    end = own.eos if template.end == "{eos}" else template.end
    text, expected = out.prompt, ""
    for answer in QUESTIONS_AND_ANSWERS[1::2]:
        start = text.index(answer.strip() if "gpt" in template.strip else answer)
        close = text.index(end, start) + len(end)
        expected += text[start:close].replace(" ", "")
        text = text[close:]
    supervised = [label for label in out.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(supervised).replace(" ", "") == expected
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(out.input_ids, out.labels, strict=True))
    assert supervised.count(tokenizer.convert_tokens_to_ids(end)) == 3


@pytest.mark.parametrize("name", [*TEMPLATES])
def test_control_tokens_typed_by_a_person_stay_text(name: str) -> None:
    published = next((own for own in PUBLISHED.values() if own.family == name), PUBLISHED["openhermes"])
    tokenizer, template = family_tokenizer(published), TEMPLATES[name]
    encoder = TextEncoder(tokenizer, template.control_tokens)
    typed = "".join([*published.tokens, published.bos, published.eos, "{eos}{bos}{text}{system}"])
    ids = [
        render(messages, template=template, encoder=encoder, image_token_id=IMAGE, num_images=1).input_ids
        for messages in (human_and_gpt("<image>\nq", "a"), human_and_gpt(f"<image>\nq{typed}", f"a{typed}"))
    ]
    added = set(tokenizer.get_added_vocab().values())
    assert [token for token in ids[0] if token in added] == [token for token in ids[1] if token in added]
    assert len(ids[0]) < len(ids[1])


@pytest.mark.parametrize(("name", "asked"), BOTH)
def test_the_saved_chat_template_gives_the_ids_of_render(name: str, asked: str) -> None:
    own = PUBLISHED[name]
    tokenizer = family_tokenizer(own)
    template = find_template(asked, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    jinja, encoder = chat_template(template, tokenizer), TextEncoder(tokenizer, template.control_tokens)
    for messages in conversations("", template):
        first = next(place for place, turn in enumerate(messages) if turn["from"] == "human")
        chat, shown = as_chat(messages), [*messages]
        shown[first] = {"from": "human", "value": f"<image>\n{messages[first]['value']}"}
        chat[first]["content"] = [{"type": "image"}, {"type": "text", "text": messages[first]["value"]}]  # type: ignore[dict-item]
        answer_next = messages[-1]["from"] == "human"
        out = render(
            shown, template=template, encoder=encoder, image_token_id=image, num_images=1, answer_next=answer_next
        )
        text = tokenizer.apply_chat_template(
            chat, chat_template=jinja, tokenize=False, add_generation_prompt=answer_next
        )
        assert tokenizer(text).input_ids == out.input_ids
        told = tokenizer.apply_chat_template(
            chat, chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [token for token, said in zip(told["input_ids"], told["assistant_masks"], strict=True) if said]
        # Where a token takes the blanks behind it, transformers counts it to an answer that begins with one.
        if not answer_next and not (own.eats and len(messages) > 3):
            assert marked == [label for label in out.labels if label != IGNORE_INDEX]


def test_a_template_that_knows_no_system_turn_refuses_one() -> None:
    tokenizer, gemma = family_tokenizer(PUBLISHED["gemma-2"]), TEMPLATES["gemma"]
    messages = [{"from": "system", "value": "Be brief."}, *human_and_gpt("q")]
    chat = as_chat(messages)
    with pytest.raises(TemplateError, match="System role not supported"):
        tokenizer.apply_chat_template(chat)
    encoder = TextEncoder(tokenizer, gemma.control_tokens)
    with pytest.raises(
        ValueError, match="template 'gemma' knows no system turn.*move its text into the first question"
    ):
        render(messages, template=gemma, encoder=encoder, image_token_id=IMAGE, num_images=0)
    with pytest.raises(TemplateError, match="template gemma knows no system turn"):
        tokenizer.apply_chat_template(chat, chat_template=chat_template(gemma, tokenizer))


def test_a_tokenizer_of_another_family_is_refused() -> None:
    encoder = TextEncoder(family_tokenizer(PUBLISHED["mistral"]))
    with pytest.raises(ValueError, match=r"no token '<\|im_start\|>'.*template: tokenizer"):
        render(human_and_gpt("q"), template=TEMPLATES["chatml"], encoder=encoder, image_token_id=IMAGE, num_images=0)
    assert encoder.lacks(TEMPLATES["chatml"].control_tokens) == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "no place"}, "answer is 'no place'; write {text} in it once"),
        ({"strip": ("user",)}, "strip has 'user'; roles are system, human, gpt"),
    ],
)
def test_a_template_without_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template("mine", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"nme": "v1"}, "is none .*store what get_template"),
        ({"name": "mine", "system": 7}, "has system=7; give text"),
        ({"name": "mine", "strip": "gpt"}, "has strip='gpt'; give a list of texts"),
        ({"name": "mine", "drop_empty": "yes"}, "has drop_empty='yes'; give true or false"),
    ],
)
def test_a_description_of_no_template_is_refused(described: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template.from_dict(described)


def test_what_0_1_stored_is_the_template_of_today() -> None:
    old = {"name": "v1", "system": TEMPLATES["v1"].system, "user": "USER", "assistant": "ASSISTANT"}
    assert Template.from_dict({**old, "answer_end": "", "end_token": True, "caption_only": False}) == TEMPLATES["v1"]
    caption = {"system": "", "answer_end": "\n", "end_token": False, "caption_only": True}
    assert Template.from_dict({**old, **caption, "name": "plain"}) == TEMPLATES["plain"]


# Templates made of a tokenizer's chat template


def test_what_a_chat_template_says_is_found_in_it() -> None:
    made = {name: template_of(family_tokenizer(own)) for name, own in PUBLISHED.items()}

    assert (made["qwen2.5"].system or "").startswith("You are Qwen")
    assert made["qwen3"].last_prompt == "<think>\n\n</think>\n\n"
    assert "Today Date: 26 Jul 2024" in made["llama-3.2"].system_turn
    assert made["llama-3.2"].system == ""
    # Mistral 0.3 writes it into the last question: that is no matter of patterns, and so no system turn is taken.
    knows = {name for name, template in made.items() if template.takes_system}
    assert knows == PUBLISHED.keys() - {"mistral", "mistral-v0.2", "gemma-2"}


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        (None, "takes the tokenizer's own chat template, and it has none; name a template"),
        ("{% for m in messages %}{{ loop.index }}{{ m['content'] }}<|im_end|>{% endfor %}", "in front of an answer"),
        ("{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}", "a message of 'user' is missing"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no token of the tokenizer ends an answer"),
        ("{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", "date of the day"),
        ("{{ raise_exception('never') }}", "it raises TemplateError: never"),
        (
            "{% for m in messages %}{{ m['content'] | replace('red', 'blue') }}<|im_end|>{% endfor %}",
            "it writes 'blue, or <b>blue</b>.*where 'red, or <b>blue</b>",
        ),
    ],
)
def test_what_is_no_matter_of_patterns_is_refused_by_name(jinja: str | None, reason: str) -> None:
    tokenizer = family_tokenizer(PUBLISHED["openhermes"])
    tokenizer.chat_template = jinja
    with pytest.raises(ValueError, match=reason):
        template_of(tokenizer)


def test_a_named_template_has_to_be_one_of_the_tokenizers_family() -> None:
    tokenizer = family_tokenizer(PUBLISHED["llama-3"])
    with pytest.raises(ValueError, match=r"'chatml' writes <\|im_start\|>, <\|im_end\|>, and .* no such tokens.*'v1'"):
        find_template("chatml", tokenizer)
    assert find_template("v1", tokenizer) is TEMPLATES["v1"]


def test_what_does_not_fit_is_said() -> None:
    llama, qwen = (family_tokenizer(PUBLISHED[name]) for name in ("llama-3", "qwen2.5"))
    assert misfits(TEMPLATES["llama-3"], llama) == misfits(template_of(qwen), qwen) == []
    assert misfits(TEMPLATES["plain"], qwen) == []
    (other,) = misfits(TEMPLATES["chatml"], qwen)
    assert "own chat template writes 'system" in other and "template: tokenizer takes that one" in other
    no_first, other = misfits(TEMPLATES["llama-2"], qwen)
    assert no_first == "it begins with the tokenizer's first token (bos), which this tokenizer has not"
