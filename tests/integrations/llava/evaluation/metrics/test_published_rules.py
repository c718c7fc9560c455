"""Rules of published scorers, by hand-computed cases; lmms-eval's functions beside them where it is installed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integrations.llava.evaluation.metrics.documents import anls, chart_answer_is_right
from integrations.llava.evaluation.metrics.open_answers import open_answer_is_right
from integrations.llava.evaluation.metrics.option_letters import (
    ai2d_letter,
    circular_letter,
    mmmu_letter,
    mmstar_letter,
    mmstar_letter_of_lmms,
)

ANLS = [
    ("1978", ["1978"], 1.0),
    (" New  York ", ["new york"], 1.0),
    ("1979", ["1978"], 0.75),
    ("19xx", ["1978"], 0.5),
    ("1xxx", ["1978"], 0.0),
    ("ITC limited", ["itc", "ITC Limited Inc"], 1 - 4 / 15),
    # The text as it was written counts for the length: 2 of 10 characters, though only 8 are compared.
    ("abcd  efgx", ["abcd efgh"], 1 - 1 / 10),
    ("", [""], 1.0),
    ("", ["a"], 0.0),
]


@pytest.mark.parametrize(("answer", "references", "score"), ANLS)
def test_anls(answer: str, references: list[str], score: float) -> None:
    assert anls(answer, references) == pytest.approx(score)


CHARTS = [
    ("105", "100", True),
    ("105.1", "100", False),
    ("95", "100", True),
    ("-95", "-100", True),
    ("50%", "0.5", True),
    ("52%", "50%", True),
    ("50", "50%", False),
    ("0", "0", True),
    ("0.01", "0", False),
    ("0.0", "0", False),
    ("Blue", "blue", True),
    ("blue.", "blue", False),
    ("1,000", "1000", False),
    ("[1, 2]", "[1, 2]", True),
    ("nan", "nan", False),
]


@pytest.mark.parametrize(("answer", "reference", "right"), CHARTS)
def test_charts(answer: str, reference: str, right: bool) -> None:
    assert chart_answer_is_right(answer, reference) is right


OPTIONS = {"A": "a red ball", "B": "the blue one", "C": "nothing", "D": "a cat"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("B. the blue one", "B"),
        ("B: it is the one that we see here", None),  # six words behind it
        ("I think that it is clearly the option named B", "B"),
        ("A or B", None),
        ("A red ball", "A"),
        ("It is A red ball lying on the grass", "A"),  # too far from the end, but the option's text stands there
        ("The Blue One", "B"),
        ("the blue one and a cat", None),
        ("b", None),
        ("Cannot determine the answer", "Z"),
        ("Z", "Z"),
        ("a cat " * 40, None),  # longer than twice all options
        ("", None),
    ],
)
def test_letters_as_vlmevalkit_finds_them(answer: str, letter: str | None) -> None:
    assert circular_letter(answer, OPTIONS) == letter


MMMU = [
    ("(B)", "B"),
    ("(A) or (B), no: (A)", "A"),
    ("B", "B"),
    ("B.", "B"),
    ("I say A or B", "B"),
    ("A (B)", "B"),
    ("The thing that we see is a cat today", "D"),
    ("it is a cat, not the blue one at all", "B"),
]


@pytest.mark.parametrize(("answer", "letter"), MMMU)
def test_letters_as_mmmu_finds_them(answer: str, letter: str) -> None:
    assert mmmu_letter(answer, OPTIONS, seed="1") == letter


def test_lmms_eval_finds_letters_in_more_forms_than_mmmu() -> None:
    # "BA " ends with "A " and "Option C." holds "C."; MMMU itself finds neither and guesses.
    assert {mmmu_letter("BA x", OPTIONS, seed=str(n), loosely=True) for n in range(9)} == {"A"}
    assert {mmmu_letter("Option:C.", OPTIONS, seed=str(n), loosely=True) for n in range(9)} == {"C"}
    assert len({mmmu_letter("BA x", OPTIONS, seed=str(n)) for n in range(40)}) == 4


def test_a_random_letter_is_the_same_for_the_same_question() -> None:
    first = [mmmu_letter("?", OPTIONS, seed=f"validation_Art_{n}") for n in range(40)]
    assert first == [mmmu_letter("?", OPTIONS, seed=f"validation_Art_{n}") for n in range(40)]
    assert set(first) == set(OPTIONS)
    assert first[:4] == ["D", "C", "B", "C"]  # on every machine


OPEN = [
    ("5", ["5"], True),
    ("The answer is 5.00", ["5"], True),
    ("It is 1,234 m", ["1234"], True),
    ("It is 1,234.5 m", ["1234.5"], False),  # read as 1,234 and 234.5
    ("x = 3\ny = 4", ["3"], False),  # of the lines but the last "=" announces nothing, and "3" stands behind none
    ("x = 3", ["3"], True),
    ("The result is 4.004", ["4"], True),
    ("the current flows left", ["Left"], True),
    ("so it is 6 V", ["5"], False),
    ("x", ["x"], True),
    ("ax", ["x"], False),  # one letter needs a blank beside it
    ("x y", ["x"], True),
    ("about 24/7", ["24/7", "3.429"], True),
    ("", ["5"], False),
]


@pytest.mark.parametrize(("answer", "references", "right"), OPEN)
def test_open_answers_as_mmmu_reads_them(answer: str, references: list[str], right: bool) -> None:
    assert open_answer_is_right(answer, references) is right


STARS = [
    ("A", "A"),
    ("b) cat", "B"),
    ("(c) dog", "C"),
    ("option d", "D"),
    ("The answer is A.", "A"),
    ("Answer: B", "A"),
    ("", None),
    ("(", None),
]


@pytest.mark.parametrize(("answer", "letter"), STARS)
def test_letters_as_mmstar_finds_them(answer: str, letter: str | None) -> None:
    assert mmstar_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[("B.", "B"), ("B dog", "B"), ("b) cat", ""), ("It is (C), not (D) dog", "D"), ("A cat or B", "A"), ("", "")],
        *[("I choose C because B: no x", "B"), ("so the answer is A; the best answer is D.x y", "D"), ("xBy", "B")],
    ],
)
def test_letters_as_lmms_eval_finds_those_of_mmstar(answer: str, letter: str) -> None:
    assert mmstar_letter_of_lmms(answer) == letter


@pytest.mark.parametrize(
    ("answer", "found"), [("B", "B"), ("b.", "B"), (" B. dog", "B"), ("(B)", "B"), ("B dog", "B DOG"), ("", "")]
)
def test_letters_as_lmms_eval_finds_those_of_ai2d(answer: str, found: str) -> None:
    assert ai2d_letter(answer) == found


@given(answer=st.text(), other=st.text(min_size=1))
def test_no_rule_raises_on_any_text(answer: str, other: str) -> None:
    anls(answer, [other])
    chart_answer_is_right(answer, other)
    open_answer_is_right(answer, [other])
    mmstar_letter(answer)
    ai2d_letter(answer)
    circular_letter(answer, {"A": other, "B": "x"})
    assert mmmu_letter(answer, {"A": other, "B": "x"}, seed=other) in "AB"


def test_rules_are_those_of_lmms_eval() -> None:
    reason = "lmms-eval is not installed"
    metrics = pytest.importorskip("lmms_eval.api.metrics", reason=reason)
    chartqa = pytest.importorskip("lmms_eval.tasks.chartqa.utils", reason=reason)
    mmstar = pytest.importorskip("lmms_eval.tasks.mmstar.utils", reason=reason)
    mmmu = pytest.importorskip("lmms_eval.tasks.mmmu.utils", reason=reason)
    for answer, references, _ in ANLS:
        assert anls(answer, references) == pytest.approx(metrics.anls(references, [answer])["anls"])
    for answer, reference, _ in CHARTS:
        assert chart_answer_is_right(answer, reference) == chartqa.relaxed_correctness(answer, reference)
    words = ["A", "B", "(C)", "D.", "the answer is", "i pick", "Best", "A:", "b", "x", "B)", "选", "and"]
    generator = random.Random(0)
    for answer in [own for own, _ in STARS] + [" ".join(generator.choices(words, k=5)) for _ in range(2000)]:
        for letter in "ABCD":
            assert (mmstar_letter_of_lmms(answer) == letter) == bool(mmstar.exact_match(answer, letter))
    for answer, _ in MMMU:
        theirs = mmmu.parse_multi_choice_response(answer, list(OPTIONS), OPTIONS)
        assert mmmu_letter(answer, OPTIONS, seed="1", loosely=True) == theirs
    for answer, references, _ in OPEN:
        theirs = mmmu.eval_open(references, mmmu.parse_open_response(answer))
        assert open_answer_is_right(answer, references) == theirs
