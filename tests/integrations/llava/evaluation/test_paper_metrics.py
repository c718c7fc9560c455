"""Published scoring rules, by cases worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integrations.llava.evaluation.metrics.binary import YesNoCounts, mme_score, read_mme_answer, read_pope_answer
from integrations.llava.evaluation.metrics.grounding import (
    decode_grounding_answer,
    grounding_overlap,
    pad_box,
    parse_float_box,
    unpad_box,
)
from integrations.llava.evaluation.metrics.ocrbench import stands_in_answer
from integrations.llava.evaluation.metrics.science_qa import read_science_qa_answer, read_science_qa_answer_of_lmms
from integrations.llava.evaluation.metrics.vqa import normalise_vqa_answer, soft_vqa_score


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Cat.", "cat"),
        ("none", "0"),
        ("ten, or two?", "10 or 2"),
        ("Dont", "don't"),
        ("someone'dve", "someone'd've"),
        ("somebody'd", "somebodyd"),  # a slip of the table
        ("im", "im"),  # its entry has a capital, which no text has by then
        ("it's", "it 's"),
        ("a/b", "b"),  # becomes "a b", whose article goes
        ("x/ y", "x y"),
        ("x-y - z", "xy z"),  # goes everywhere once it touches a blank
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("1.a", "1a"),  # meant to stay behind a digit
        ("line\nbreak\ttab", "line break tab"),
        ("!", ""),
    ],
)
def test_answers_are_normalised_with_the_published_slips(answer: str, normalised: str) -> None:
    assert normalise_vqa_answer(answer) == normalised


def test_full_stops_beyond_the_32nd_stay() -> None:
    assert normalise_vqa_answer("x" + "." * 40) == "x" + "." * 8


@pytest.mark.parametrize(("count", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_scores_of_ten_people(count: int, score: float) -> None:
    people = ["The Cat"] * count + ["dog"] * (10 - count)
    assert soft_vqa_score("cat.", people) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("No", False),
        ("no,", False),
        ("Yes, not. No", False),
        ("Yes. no", True),
        ("NO", True),
        ("Nope", True),
        ("", True),
    ],
)
def test_pope_reads_no_in_three_words_only(answer: str, yes: bool) -> None:
    assert read_pope_answer(answer) is yes


@pytest.mark.parametrize(
    ("answer", "strict", "lenient"),
    [
        ("Yes", "yes", "yes"),
        ("NO.", "no", "no"),
        ("a yes", "other", "other"),
        (" yes", "yes", "yes"),
        ("n", "other", "no"),
        ("Not", "no", "no"),
        ("know", "no", "no"),
        ("  yes", "other", "yes"),
        ("noyes", "no", "no"),
        ("nyes", "yes", "yes"),
        ("", "other", "other"),
    ],
)
def test_mme_reads_the_first_four_characters(answer: str, strict: str, lenient: str) -> None:
    assert (read_mme_answer(answer), read_mme_answer(answer, lenient=True)) == (strict, lenient)


def test_mme_adds_questions_and_images() -> None:
    rights = [("a", True), ("b", True), ("a", True), ("b", False), ("c", False), ("c", False)]
    assert mme_score(rights) == pytest.approx({"accuracy": 0.5, "accuracy_plus": 1 / 3, "score": 50 + 100 / 3})


def test_shares_of_nothing_are_zero() -> None:
    counts = YesNoCounts.of([(False, False), (False, True)])
    assert (counts.precision, counts.recall, counts.f1, counts.accuracy, counts.yes_ratio) == (0, 0, 0, 0.5, 0)
    assert YesNoCounts.of([]).accuracy == 0


@pytest.mark.parametrize(
    ("answer", "letter", "lmms"),
    [
        ("B", "B", "B"),
        ("B. owl", "B", "B"),
        ("The answer is B.", "B", None),
        ("I say: The answer is B!", "B", None),
        ("B.", None, "B"),
        ("(B)", None, None),
        ("b", None, "B"),
        (" B", None, "B"),
        ("The answer is B", None, None),
        ("The answer is A. The answer is B.", None, None),
        ("D", None, "D"),  # there are three choices
        ("", None, None),
    ],
)
def test_letters_of_scienceqa(answer: str, letter: str | None, lmms: str | None) -> None:
    assert read_science_qa_answer(answer, 3) == letter
    said = read_science_qa_answer_of_lmms(answer)
    assert (said if said in set("ABCD") else None) == lmms


def test_ocrbench_looks_for_the_text_anywhere() -> None:
    assert stands_in_answer("It says\nJOE'S bar", ["x", " joe's BAR "], "svt")
    assert not stands_in_answer("foobar", ["foo bar"], "svt")
    assert stands_in_answer("a", [""], "svt")
    assert stands_in_answer(" X ^ { 2 }", ["X^{2}"], "HME100k")
    assert not stands_in_answer("x^{2}", ["X^{2}"], "HME100k")
    assert stands_in_answer("X^{2}", ["X^{2}"], "HME100k", narrow=True)
    assert not stands_in_answer("\uff2a\uff2f\uff25", ["joe"], "svt")
    assert stands_in_answer("\uff2a\uff2f\uff25", ["joe"], "svt", narrow=True)


def test_a_box_in_the_frame_of_the_padded_square() -> None:
    # 200 x 100 stands 50 pixels below the top of a square of 200.
    assert pad_box((0.1, 0.0, 0.5, 1.0), 200, 100) == pytest.approx((0.1, 0.25, 0.5, 0.75))
    assert unpad_box((0.1, 0.25, 0.5, 0.75), 200, 100) == pytest.approx((0.1, 0.0, 0.5, 1.0))
    # 3 x 8: two pixels before, three behind, as preprocessing pads.
    assert pad_box((0.0, 0.0, 1.0, 1.0), 3, 8) == pytest.approx((2 / 8, 0.0, 5 / 8, 1.0))
    assert unpad_box((0.0, 0.0, 1.0, 1.0), 3, 8) == pytest.approx((-2 / 3, 0.0, 2.0, 1.0))


SIDES = st.integers(1, 3000)
FRACTIONS = st.floats(0, 1)


@given(box=st.tuples(FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS), width=SIDES, height=SIDES)
def test_boxes_come_back_from_the_other_frame(box: tuple[float, float, float, float], width: int, height: int) -> None:
    padded = pad_box(box, width, height)
    assert all(-1e-9 <= edge <= 1 + 1e-9 for edge in padded)
    assert unpad_box(padded, width, height) == pytest.approx(box, abs=1e-9 * max(width, height))
    if width == height:
        assert padded == pytest.approx(box)


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("It is [ 0,0.5,1 ] or [0,-0.5,1,2 ].", (0, -0.5, 1, 2)),
        ("[[1, 2, 3, 4]]", (1, 2, 3, 4)),
        ("[.1, .2, .3, .4]", None),
        ("[0.1 , 0.2, 0.3, 0.4]", None),
        ("(0.1, 0.2, 0.3, 0.4)", None),
    ],
)
def test_boxes_of_floats(answer: str, box: tuple[float, ...] | None) -> None:
    assert parse_float_box(answer) == box


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("[[0, 0, 999, 999]]", (0, 0, 200, 100)),
        ("a [[0, 0, 0, 999]] b [[0, 0, 999, 999]]", (0, 0, 0, 100)),
        ("[[0, 0, 999, 999], [1, 2, 3, 4]]", (0, 0, 200, 100)),
        ("[[0, 0, 999, 999, 0, 0, 999, 999]]", (0, 0, 0, 0)),
        ("[0, 0, 999, 999]", (0, 0, 0, 0)),
        ("[[]]", (0, 0, 0, 0)),
        ("[[1e999, 0, 0, 0]]", (float("inf"), 0, 0, 0)),
        ("[[1" + "0" * 400 + ", 0, 0, 0]]", (0, 0, 0, 0)),
        ("[[true, 0, 0, null]]", (0, 0, 0, 0)),
    ],
)
def test_boxes_in_steps_of_a_scale(answer: str, box: tuple[float, ...]) -> None:
    assert decode_grounding_answer(answer, 200, 100) == pytest.approx(box)


def test_boxes_in_steps_of_a_scale_in_the_square() -> None:
    assert decode_grounding_answer("[[0, 250, 1000, 750]]", 200, 100, scale=1000, square_pad=True) == (0, 0, 200, 100)
    assert decode_grounding_answer("none", 200, 100, square_pad=True) == (0, -50, 0, -50)


def test_overlaps_in_single_precision() -> None:
    assert grounding_overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert grounding_overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert not grounding_overlap((0, 0, 0, 0), (0, 0, 0, 0)) > 0.5
