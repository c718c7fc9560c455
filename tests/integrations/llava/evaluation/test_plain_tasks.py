"""The kinds for questions of one's own: what counts as an answer, and which references are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integrations.llava.evaluation import TASKS, Question, read_questions
from integrations.llava.evaluation.metrics.text import holds_words, parse_choice, parse_number, parse_yes_no


def read(folder: Path, **row: Any) -> Question:
    """The question of a file with one line."""
    path = folder / "q.jsonl"
    path.write_text(json.dumps({"question_id": 0, "image": "a.png", "text": "What?", **row}))
    (question,) = read_questions(path)
    return question


def accuracy(question: Question, answer: str) -> float:
    return TASKS.get(question.kind)().score(answer, question)["accuracy"]


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("cat", "Cat", 1.0),
        ("cat", " a  'cat'.", 0.0),
        ("cat", "'a cat.'", 1.0),
        ("The cat.", "cat", 1.0),
        ("cat", "cats", 0.0),
        ("cat", "It is a cat", 0.0),
        (["cat", "kitten"], "A kitten.", 1.0),
        (["cat", "kitten"], "cat, kitten", 0.0),
        (7, "7", 1.0),
        ("\uff23\uff21\uff34", "cat", 1.0),
    ],
)
def test_exact_match(reference: Any, answer: str, right: float, tmp_path: Path) -> None:
    assert accuracy(read(tmp_path, kind="exact_match", answer=reference), answer) == right


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("exit", 'The sign says "EXIT".', 1.0),
        ("exit", "exits", 0.0),
        ("exit", "coexit, then exit", 1.0),
        ("3", "There are 13.", 0.0),
        ("3", "There are 3.", 1.0),
        ("red  car", "It's a red car!", 1.0),
        ("red car", "a car that is red", 0.0),
        (["cat", "kitten"], "my kitten", 1.0),
        ("\u732b", "\u8fd9\u662f\u732b\u3002", 1.0),
        ("caf\u00e9", "the caf\u00e9s", 0.0),
        ("c++", "in c++ only", 1.0),
        ("exit", "", 0.0),
    ],
)
def test_contains(reference: Any, answer: str, right: float, tmp_path: Path) -> None:
    assert accuracy(read(tmp_path, kind="contains", answer=reference), answer) == right


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("NO, there are none", "no"),
        ("Yes, no doubt", "yes"),
        ("There is no cat", "no"),
        ("I say yes", "yes"),
        ("is it yes or no", None),
        ("not at all", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_yes_no(answer: str, said: str | None, tmp_path: Path) -> None:
    assert parse_yes_no(answer) == said
    for reference, meaning in (("Yes", "yes"), (True, "yes"), ("no", "no"), (False, "no")):
        question = read(tmp_path, kind="yes_no", answer=reference)
        assert question.answer == meaning
        assert accuracy(question, answer) == float(said == meaning)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("b.", "B"),
        ("B. a dog", "B"),
        ("(B) a cat", "B"),
        ("B: because", "B"),
        ("a dog", "B"),
        ("Dog.", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("the correct option is B, a dog", "B"),
        ("option A or option B", None),
        ("A dog", "B"),
        ("A horse", None),
        ("the answer is a horse", None),
        ("The answer is I'm not sure", None),
        ("D", None),
        ("cat or dog", None),
        ("", None),
    ],
)
def test_multiple_choice_with_options(answer: str, letter: str | None, tmp_path: Path) -> None:
    choices = ["a cat", "a dog", "a bird"]
    assert parse_choice(answer, choices) == letter
    for reference in ("B", "a dog"):
        question = read(tmp_path, kind="multiple_choice", answer=reference, choices=choices)
        assert question.answer == "B"
        assert accuracy(question, answer) == float(letter == "B")


def test_options_are_asked_as_llava_asks_them(tmp_path: Path) -> None:
    question = read(tmp_path, kind="multiple_choice", answer="B", choices=["cat", "dog"])
    asked = "What?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert TASKS.get("multiple_choice")().prompt(question) == asked
    written = read(tmp_path, kind="multiple_choice", answer="(d)")
    assert TASKS.get("multiple_choice")().prompt(written) == "What?"
    assert accuracy(written, "D") == 1.0
    assert accuracy(written, "a dog") == 0.0


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("3", "3"),
        ("3.0", "3"),
        ("three", "3"),
        ("There are 3, I think.", "3"),
        ("-2.5 m", "-2.5"),
        ("\u22122.5", "-2.5"),
        ("1,234.5", "1234.5"),
        ("$40", "40"),
        ("40%", "40"),
        ("2e3", "2000"),
        (".5", "0.5"),
        ("covid-19", "19"),
        ("3 of 3", "3"),
        ("1-2", None),
        ("2,5", None),
        ("1.2.3", None),
        ("3 or 4", None),
        ("three or 4", None),
        ("many", None),
        ("9" * 5000, None),
        ("1e999999999", None),
    ],
)
def test_number(answer: str, number: str | None, tmp_path: Path) -> None:
    given_number = parse_number(answer)
    assert given_number == (None if number is None else read_decimal(number))
    if number is not None:
        assert accuracy(read(tmp_path, kind="number", answer=number), answer) == 1.0
        assert accuracy(read(tmp_path, kind="number", answer=float(number)), answer) == 1.0
        assert accuracy(read(tmp_path, kind="number", answer="77"), answer) == 0.0


def read_decimal(number: str) -> Any:
    from decimal import Decimal

    return Decimal(number)


@pytest.mark.parametrize(
    ("tolerance", "answer", "right"),
    [(0.1, "2.4", 1.0), (0.1, "2.6", 1.0), (0.1, "2.39", 0.0), (0, "2.5", 1.0), (0, "2.51", 0.0), (1, "1.5", 1.0)],
)
def test_a_number_may_be_off_by_the_tolerance(tolerance: float, answer: str, right: float, tmp_path: Path) -> None:
    assert accuracy(read(tmp_path, kind="number", answer=2.5, tolerance=tolerance), answer) == right


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "exact_match", "answer": ""}, 'answer is ""; give a text with a word in it'),
        ({"kind": "exact_match", "answer": []}, r"answer is \[\]; give a text with a word"),
        ({"kind": "exact_match", "answer": ["cat", None]}, "answer is null; give a text or a number"),
        ({"kind": "contains", "answer": "."}, r'answer is "\."; give a text with a word'),
        ({"kind": "contains", "answer": ["cat", " "]}, r"answer is .*; give a text .*, or several in a list"),
        ({"kind": "yes_no", "answer": "maybe"}, 'answer is "maybe"; give "yes" or "no", true or false'),
        ({"kind": "yes_no", "answer": 1}, 'answer is 1; give "yes" or "no"'),
        ({"kind": "yes_no", "answer": None}, 'answer is null; give "yes" or "no"'),
        ({"kind": "multiple_choice", "answer": "a dog"}, 'answer is "a dog"; give the letter of an option'),
        ({"kind": "multiple_choice", "answer": "C", "choices": ["a", "b"]}, 'answer is "C"; give the letter'),
        ({"kind": "multiple_choice", "answer": 1, "choices": ["a", "b"]}, "answer is 1; give the letter"),
        ({"kind": "multiple_choice", "answer": "A", "choices": "ab"}, 'choices are "ab"; give up to 26 texts'),
        ({"kind": "multiple_choice", "answer": "A", "choices": ["a", "a"]}, "choices are .*; give up to 26 texts that"),
        ({"kind": "number", "answer": "many"}, "answer is many; give one number"),
        ({"kind": "number", "answer": "1 or 2"}, "answer is 1 or 2; give one number"),
        ({"kind": "number", "answer": float("inf")}, "answer is inf; give one number"),
        ({"kind": "number", "answer": 1, "tolerance": -1}, "tolerance is -1; give 0 or a positive number"),
        ({"kind": "number", "answer": 1, "tolerance": "0.1"}, 'tolerance is "0.1"; give 0 or'),
    ],
)
def test_references_that_cannot_be_compared_with_are_refused_with_their_line(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"q\.jsonl, line 1: {message}"):
        read(tmp_path, **row)


@given(answer=st.text(), words=st.text(min_size=1))
def test_no_reader_raises_on_any_text(answer: str, words: str) -> None:
    parse_number(answer)
    parse_yes_no(answer)
    parse_choice(answer, [words])
    assert holds_words(f"{answer} {words} {answer}", words)
