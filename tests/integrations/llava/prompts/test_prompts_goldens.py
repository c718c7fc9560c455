"""Prompts, ids and labels against the published code's, on every recorded conversation.

Which rows have to be equal is read from what they hold: all but those that fall into one of `Cause`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from enum import Enum
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from integrations.llava.data import Collator, ConversationDataset, image_names
from integrations.llava.image_layout import FixedLayout, ImageSize
from integrations.llava.prompts import EOS, IGNORE_INDEX, IMAGE_TAG, TEMPLATES, Rendered, Template, TextEncoder, render
from layerfuse.preprocessing import Preprocessing
from tests.goldens_support import SHARED

FOLDER = SHARED / "preprocess"
PUBLISHED_IMAGE = -200

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="goldens not found; set LAYERFUSE_GOLDENS to their folder")


class Cause(Enum):
    """Why the published code reads a conversation in another way than it was meant."""

    CONTROL = "a control token is spelled out in a message, and becomes one"
    ROLE = "the assistant's name is written in a message, where the rounds are then split"
    EMPTY_QUESTION = "an empty question is written without its separator, so that rounds merge"
    EMPTY_ANSWER = "an empty last answer is written without its separator"
    ENDS_WITH_HUMAN = "nothing answers the last message, whose round is miscounted"


# All labels of these are lost there, without anyone having meant it: "tokenization mismatch".
DROPPED_BY_ACCIDENT = {
    "assistant_word_in_answer": Cause.ROLE,
    "assistant_word_in_question": Cause.ROLE,
    "assistant_word_second_round": Cause.ROLE,
    "empty_answer": Cause.EMPTY_ANSWER,
    "empty_question_text": Cause.EMPTY_QUESTION,
    "ends_with_human": Cause.ENDS_WITH_HUMAN,
    "eos_literal_in_answer": Cause.CONTROL,
    "eos_literal_in_question_text": Cause.CONTROL,
    "unk_literal_image": Cause.CONTROL,
    "unk_literal_text": Cause.CONTROL,
}


def recorded(name: str) -> Any:
    """A file of the goldens; nothing where they are not."""
    file = FOLDER / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


ROWS = [row for rows in recorded("conversations.json").values() for row in rows]
SPECIAL = [
    token["content"] for token in recorded("tokenizer/tokenizer_config.json").get("added_tokens_decoder", {}).values()
]


def turns_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """Messages, but for a leading one of the model."""
    turns: list[dict[str, str]] = row["sample"]["conversations"]
    return turns[1:] if turns[0]["from"] == "gpt" else turns


def cause(row: dict[str, Any]) -> Cause | None:
    """Why a row may differ, read off its sample."""
    turns, template = turns_of(row), TEMPLATES[row["version"]]
    texts = [turn["value"] for turn in turns]
    answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
    if any(token in text for text in texts for token in SPECIAL):
        return Cause.CONTROL
    if "image" in row["sample"] and any(IMAGE_TAG in answer for answer in answers):
        return Cause.CONTROL
    if template.caption_only:
        return None
    if any(f"{template.prompt} " in f"{text} " for text in texts):
        return Cause.ROLE
    if any(not turn["value"] for turn in turns if turn["from"] == "human"):
        return Cause.EMPTY_QUESTION
    if turns[-1]["from"] == "human":
        return Cause.ENDS_WITH_HUMAN
    return None if texts[-1] else Cause.EMPTY_ANSWER


def each(rows: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """One test per row."""
    return pytest.mark.parametrize("row", rows, ids=[f"{row['id']}-{row['model_max_length']}" for row in rows])


REFUSED = [row for row in ROWS if "raises" in row]
WRITTEN = [row for row in ROWS if "raises" not in row]
EQUAL = [row for row in WRITTEN if cause(row) is None]
DROPPED = [row for row in WRITTEN if row["printed_warning"]]
SAME_IDS = [row for row in WRITTEN if cause(row) not in (Cause.CONTROL, Cause.EMPTY_ANSWER)]


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The fast tokenizer as it was saved, and made of the SentencePiece model, which is all that Vicuna has."""
    folder = tmp_path_factory.mktemp("tokenizer") / "copy"
    shutil.copytree(FOLDER / "tokenizer", folder)
    if request.param == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """Ours."""
    return TextEncoder(tokenizer)


def render_row(row: dict[str, Any], encoder: TextEncoder) -> Rendered:
    return render(
        row["sample"]["conversations"],
        template=TEMPLATES[row["version"]],
        encoder=encoder,
        image_token_id=PUBLISHED_IMAGE,
        num_images=len(image_names(row["sample"])),
    )


def spelled(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Ids as text without blanks, which tokenizers drop and add at the ends."""
    return "".join(tokenizer.decode(ids, clean_up_tokenization_spaces=False).split())


def answers_of(row: dict[str, Any], encoder: TextEncoder) -> str:
    """What has to be supervised, without blanks: answers with their ends; an empty one only if it is the last."""
    template, turns = TEMPLATES[row["version"]], turns_of(row)
    end = encoder.spelling(template.end)
    answers = [turn["value"] + end for turn in turns if turn["from"] == "gpt" and (turn["value"] or turn is turns[-1])]
    return "".join("".join(answers).split())


def cut(row: dict[str, Any], out: Rendered) -> tuple[list[int], list[int]]:
    """Ids and labels as long as they were recorded: samples without image are cut by the tokenizer, others later."""
    end = None if "image" in row["sample"] else row["model_max_length"]
    return out.input_ids[:end], out.labels[:end]


@each(EQUAL)
def test_prompt_ids_and_labels_equal_goldens(row: dict[str, Any], encoder: TextEncoder) -> None:
    out = render_row(row, encoder)
    ids, labels = cut(row, out)

    assert (out.prompt, ids, labels) == (row["prompt"], row["input_ids"], row["labels"])
    assert (len(ids), sum(label != IGNORE_INDEX for label in labels)) == (row["length"], row["n_supervised"])


@each([row for row in WRITTEN if cause(row) is not None])
def test_where_goldens_were_misread_ours_differ_by_that_only(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder
) -> None:
    out, why = render_row(row, encoder), cause(row)
    ids, _ = cut(row, out)

    if why is Cause.EMPTY_ANSWER:
        assert (out.prompt, ids) == (row["prompt"] + encoder.spelling(EOS), [*row["input_ids"], encoder.end])
    elif why is Cause.CONTROL:
        special = {*tokenizer.all_special_ids, PUBLISHED_IMAGE}
        assert [token for token in ids if token in special] == control_tokens(row, encoder)
    else:
        assert (out.prompt, ids) == (row["prompt"], row["input_ids"])


def control_tokens(row: dict[str, Any], encoder: TextEncoder) -> list[int]:
    """What the template writes into a conversation of one image, or none."""
    found, template = [*encoder.begin], TEMPLATES[row["version"]]
    for turn in turns_of(row):
        if turn["from"] == "human":
            found += [PUBLISHED_IMAGE] * ("image" in row["sample"] and IMAGE_TAG in turn["value"])
        elif template.end and (turn["value"] or turn is turns_of(row)[-1]):
            found.append(encoder.end)
    return found


def test_conversations_that_raised_in_goldens_are_refused(encoder: TextEncoder) -> None:
    for row in REFUSED:
        with pytest.raises(ValueError, match=r"alternate|one caption"):
            render_row(row, encoder)


@each(WRITTEN)
def test_answers_of_goldens_are_supervised_and_nothing_else_is(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder
) -> None:
    out = render_row(row, encoder)
    supervised = [label for label in out.labels if label != IGNORE_INDEX]

    assert spelled(supervised, tokenizer) == answers_of(row, encoder)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(out.input_ids, out.labels, strict=True))


@each(DROPPED)
def test_rows_that_goldens_drop_by_accident_are_supervised(row: dict[str, Any], encoder: TextEncoder) -> None:
    why = cause(row)

    assert why is not None
    assert why is DROPPED_BY_ACCIDENT.get(row["id"], why)
    assert row["all_masked"]
    assert render_row(row, encoder).num_supervised > 0


def test_rows_without_a_label_in_goldens_were_cut_before_their_answer(encoder: TextEncoder) -> None:
    for row in (row for row in WRITTEN if row["all_masked"] and not row["printed_warning"]):
        out = render_row(row, encoder)
        assert out.num_supervised > 0
        assert set(out.labels[: row["model_max_length"]]) == {IGNORE_INDEX}


def test_the_list_of_dropped_rows_is_that_of_goldens() -> None:
    dropped = {row["id"] for row in DROPPED}

    assert dropped
    assert {row["id"] for row in ROWS} & DROPPED_BY_ACCIDENT.keys() <= dropped


class _Uncounted(FixedLayout):
    """One position an image, and as the published code has it, no look at how many images there are."""

    name = "as published"

    def repeats(self, ids: Sequence[int], image_sizes: Sequence[ImageSize | None]) -> list[int]:
        return [1] * len(ids)


@each(SAME_IDS)
def test_lengths_of_goldens_behind_the_collator(row: dict[str, Any], encoder: TextEncoder) -> None:
    dataset = ConversationDataset(
        [row["sample"]],
        image_folder=SHARED / "images",
        template=TEMPLATES[row["version"]],
        encoder=encoder,
        preprocessing=Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, mode="pad"),
        layout=_Uncounted(PUBLISHED_IMAGE, 1),
        max_length=row["model_max_length"],
    )
    batch = Collator(pad_token_id=0)([dataset[0]])

    assert batch["input_ids"].shape == (1, row["after_collator_length"])
    assert batch["input_ids"][0].tolist() == row["input_ids"][: row["after_collator_length"]]


def test_texts_of_goldens_without_control_tokens_have_the_slow_tokenizers_ids(
    tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder
) -> None:
    compared = 0
    for vector in recorded("tokenizer_vectors.json")["vectors"]:
        ours = encoder.begin + encoder(vector["text"], at_start=True)
        if any(token in vector["text"] for token in SPECIAL):
            assert [token for token in ours if token in tokenizer.all_special_ids] == encoder.begin
        else:
            assert ours == vector["input_ids"], vector["text"]
            compared += 1
    assert compared


def test_texts_of_goldens_around_images_have_the_slow_tokenizers_ids(
    encoder: TextEncoder,
) -> None:
    compared = 0
    for vector in recorded("tokenizer_vectors.json")["tokenizer_image_token"]:
        if any(token in vector["prompt"] for token in SPECIAL):
            continue
        first, *rest = vector["prompt"].split(IMAGE_TAG)
        ours = encoder.begin + encoder(first, at_start=True)
        for text in rest:
            ours += [PUBLISHED_IMAGE, *encoder(text, at_start=True)]
        assert ours == vector["input_ids"], vector["prompt"]
        compared += 1
    assert compared


@pytest.mark.parametrize("name", recorded("templates.json"))
def test_templates_of_goldens(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Those of the two styles that LLaVA-1.5 trains with; version 0's "###" is not ours."""
    published = recorded("templates.json")[name]
    if published["sep_style"] == "PLAIN":
        expected = Template(name, begin="", user_turn="", answer="{text}" + published["sep"])
    elif published["sep_style"] == "TWO":
        user, assistant = published["roles"]
        assert (published["sep"], published["sep2"]) == (" ", tokenizer.eos_token)
        expected = Template(
            name,
            system=published["system"],
            system_turn="{text} ",
            user_turn=f"{user}: {{text}} ",
            prompt=f"{assistant}:",
            answer=" {text}{eos}",
            drop_empty=True,
        )
    else:
        assert name not in TEMPLATES
        return
    assert dataclasses.asdict(TEMPLATES[name]) == dataclasses.asdict(expected)
