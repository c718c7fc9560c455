"""Prompts, ids and labels against the published code's, on every recorded conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from integrations.llava.prompts import IGNORE_INDEX, TEMPLATES, TextEncoder, render

# Rows that the published code drops by accident (all labels masked): prompts and ids are equal, we supervise answers.
DROPPED_BY_ACCIDENT = {
    "empty_question_text",
    "assistant_word_in_question",
    "assistant_word_in_answer",
    "assistant_word_second_round",
    "ends_with_human",
}
# Rows whose words spell control tokens: there they become control tokens, here they stay text. `empty_answer` is no
# such row; its prompt ends without </s> there, and with it here.
TYPED_CONTROL_TOKENS = {
    "bos_literal_text",
    "eos_literal_in_answer",
    "eos_literal_in_question_text",
    "unk_literal_image",
    "unk_literal_text",
    "image_token_in_answer",
    "plain_eos_literal",
    "plain_image_tag_in_caption",
}
REFUSED = {"two_humans_in_a_row", "plain_text_only", "plain_two_rounds"}


def _rows(goldens: Path) -> list[tuple[int, dict[str, Any]]]:
    recorded = json.loads((goldens / "preprocess" / "conversations.json").read_text())
    return [(int(length), row) for length, rows in recorded.items() for row in rows]


def test_every_recorded_conversation_of_the_goldens(goldens: Path) -> None:
    encoder = TextEncoder(AutoTokenizer.from_pretrained(goldens / "preprocess" / "tokenizer"))
    equal, different = 0, set()
    for max_length, row in _rows(goldens):
        sample = row["sample"]

        def rendered(sample: dict[str, Any] = sample, row: dict[str, Any] = row) -> Any:
            return render(
                sample["conversations"],
                template=TEMPLATES[row["version"]],
                encoder=encoder,
                image_token_id=-200,
                num_images=int("image" in sample),
            )

        if row.get("raises"):
            assert row["id"] in REFUSED
            with pytest.raises(ValueError, match=r"alternate|one caption"):
                rendered()
            continue
        out = rendered()
        # There, samples without image are cut before the collator.
        end = None if "image" in sample else max_length
        same_ids = out.prompt == row["prompt"] and out.input_ids[:end] == row["input_ids"]
        if same_ids and out.labels[:end] == row["labels"]:
            equal += 1
            continue
        different.add(row["id"])
        if row["id"] in DROPPED_BY_ACCIDENT:
            assert same_ids
        assert any(label != IGNORE_INDEX for label in out.labels)
    assert different == DROPPED_BY_ACCIDENT | TYPED_CONTROL_TOKENS | {"empty_answer"}
    assert equal == 38
