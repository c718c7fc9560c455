from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integrations.llava.evaluation import TASKS, Question
from integrations.llava.evaluation.metrics.boxes import intersection_over_union, parse_box
from integrations.llava.evaluation.metrics.text import edit_distance, normalise_answer, parse_count, strip_answer

KINDS = ("box", "color", "counting", "ocr", "shape")
PLAIN_KINDS = ("contains", "exact_match", "multiple_choice", "number", "yes_no")
REFERENCES = {"box": (0.1, 0.1, 0.4, 0.4), "counting": "3", "multiple_choice": "B", "number": "2.5", "yes_no": "no"}


def ask(kind: str, answer: str | tuple[float, ...]) -> Question:
    return Question(question_id=0, image="a.png", text="?", kind=kind, answer=answer)


def score(kind: str, given_answer: str, answer: str | tuple[float, ...]) -> dict[str, float]:
    return dict(TASKS.get(kind)().score(given_answer, ask(kind, answer)))


def test_every_task_file_is_registered(root: Path) -> None:
    folder = root / "integrations" / "llava" / "evaluation"
    # Benchmarks of the paper are tested beside their fixtures, test_paper_tasks.py.
    files = [
        path.stem
        for path in folder.rglob("*.py")
        if path.parent.name not in ("paper", "detail") and "@TASKS.register" in path.read_text()
    ]
    assert tuple(sorted(files)) == tuple(sorted([*KINDS, *PLAIN_KINDS]))
    assert {*KINDS, *PLAIN_KINDS} <= set(TASKS.names())


@pytest.mark.parametrize("kind", [*KINDS, *PLAIN_KINDS])
def test_task_states_its_title_and_source_and_asks_the_question(kind: str) -> None:
    task = TASKS.get(kind)()
    assert task.title
    assert task.source
    assert task.prompt(ask(kind, "x")) == "?"
    assert task.submission([]) is None


@pytest.mark.parametrize("kind", [*KINDS, *PLAIN_KINDS])
@given(answer=st.text(max_size=60))
def test_any_answer_scores_between_zero_and_one(kind: str, answer: str) -> None:
    scores = score(kind, answer, REFERENCES.get(kind, "ring"))
    assert next(iter(scores)) == "accuracy"
    assert all(0 <= value <= 1 for value in scores.values())


@given(parts=st.lists(st.one_of(st.floats(), st.integers(), st.text(max_size=5)), max_size=6), blank=st.text(" \n\t"))
def test_box_parser_never_raises_and_gives_ordered_fractions(parts: list[object], blank: str) -> None:
    box = parse_box(f"at [{blank}{', '.join(map(str, parts))}{blank}]")
    if box is not None:
        x1, y1, x2, y2 = box
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1


@given(answer=st.text())
def test_no_parser_raises_on_any_text(answer: str) -> None:
    parse_box(answer)
    parse_count(answer)
    normalise_answer(answer)
    strip_answer(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[]",
        "[0.1, 0.1, 0.4]",
        "[0.1, 0.1, 0.4, 0.4, 0.5]",
        "0.1, 0.1, 0.4, 0.4",
        "[0.1, 0.1, 0.4, 0.4",
        "[nan, 0.1, 0.4, 0.4]",
        "[inf, 0.1, 0.4, 0.4]",
        "[1e-1, 0.1, 0.4, 0.4]",
        "[0.4, 0.1, 0.1, 0.4]",
        "[0.1, 0.1, 0.1, 0.4]",
        "[0.1, 0.1, 0.4, 1.4]",
        "[-0.1, 0.1, 0.4, 0.4]",
        "[a, b, c, d]",
        "[0.1 0.1 0.4 0.4]",
        "[0..1, 0.1, 0.4, 0.4]",
        f"[{'9' * 500}, 0.1, 0.4, 0.4]",
    ],
)
def test_malformed_box_is_wrong(answer: str) -> None:
    assert parse_box(answer) is None
    assert score("box", answer, (0.1, 0.1, 0.4, 0.4)) == {"accuracy": 0.0, "iou": 0.0}


def test_box_is_found_inside_a_sentence_and_the_first_counts() -> None:
    assert parse_box("It is at [0.10,0.2, .3 ,0.40] or [0, 0, 1, 1].") == (0.1, 0.2, 0.3, 0.4)


def test_box_needs_more_than_half_overlap() -> None:
    right = (0.0, 0.0, 0.5, 0.5)
    assert score("box", "[0, 0, 0.5, 0.5]", right) == {"accuracy": 1.0, "iou": 1.0}
    # Twice the area: an IoU of exactly one half, which is not above it.
    assert score("box", "[0, 0, 1, 0.5]", right) == {"accuracy": 0.0, "iou": 0.5}
    assert score("box", "[0, 0, 0.96, 0.5]", right)["accuracy"] == 1.0
    assert score("box", "[0.5, 0.5, 1, 1]", right) == {"accuracy": 0.0, "iou": 0.0}
    assert score("box", "[0, 0, 0.5, 0.5]", "[0.00, 0.00, 0.50, 0.50]")["iou"] == 1.0


boxes = st.tuples(*[st.floats(0, 0.5)] * 2, *[st.floats(0.51, 1)] * 2)


@given(first=boxes, second=boxes)
def test_overlap_is_symmetric_and_one_only_for_equal_boxes(first: tuple, second: tuple) -> None:
    overlap = intersection_over_union(first, second)
    assert overlap == pytest.approx(intersection_over_union(second, first))
    assert intersection_over_union(first, first) == pytest.approx(1.0)
    assert 0 <= overlap <= 1 + 1e-9


@pytest.mark.parametrize(
    ("answer", "right"), [("K7F", 1.0), (" K7F.\n", 1.0), ('"K7F"', 1.0), ("k7f", 0.0), ("K7", 0.0), ("", 0.0)]
)
def test_ocr_needs_the_exact_string(answer: str, right: float) -> None:
    assert score("ocr", answer, "K7F")["accuracy"] == right


@pytest.mark.parametrize(
    ("answer", "share"), [("K7F", 1.0), ("K7X", 2 / 3), ("7F", 2 / 3), ("XXX", 0.0), ("", 0.0), ("K7F" * 400, 0.0)]
)
def test_ocr_counts_right_characters(answer: str, share: float) -> None:
    assert score("ocr", answer, "K7F")["character_accuracy"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("kitten", "sitting", 3), ("abc", "", 3), ("", "ab", 2), ("flaw", "lawn", 2)],
)
def test_edit_distance_of_known_pairs(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == distance


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("2", 2),
        ("two", 2),
        ("There are 2.", 2),
        ("None", 0),
        ("2 circles, 2", 2),
        ("2 or 3", None),
        ("2.5", None),
        ("many", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_count_is_the_only_number(answer: str, count: int | None) -> None:
    assert parse_count(answer) == count


def test_unreadable_count_is_wrong_even_if_the_reference_is_too() -> None:
    assert score("counting", "many", "many")["accuracy"] == 0.0
    assert score("counting", "three", "3")["accuracy"] == 1.0


@pytest.mark.parametrize("kind", ["color", "shape"])
@pytest.mark.parametrize(
    ("answer", "right"),
    [("Ring", 1.0), (" a  ring. ", 1.0), ("'ring'", 1.0), ("rings", 0.0), ("red ring", 0.0), ("", 0.0)],
)
def test_words_match_after_normalisation(kind: str, answer: str, right: float) -> None:
    assert score(kind, answer, "ring")["accuracy"] == right


@pytest.mark.parametrize(
    ("answer", "stripped"),
    [
        ('"K7F."', "K7F"),
        ('"K7F".', "K7F"),
        ("'K7F.'", "K7F"),
        ("`K7F. `", "K7F"),
        ("K7F.", "K7F"),
        ("K7F..", "K7F."),
        ('"K7F', '"K7F'),
        ("'", "'"),
        ('"."', ""),
    ],
)
def test_blanks_quotes_and_a_stop_around_an_answer_are_removed(answer: str, stripped: str) -> None:
    assert strip_answer(answer) == stripped


def test_a_full_stop_inside_quotes_is_forgiven() -> None:
    assert score("ocr", '"K7F."', "K7F") == {"accuracy": 1.0, "character_accuracy": 1.0}
    assert score("color", "'Red.'", "red")["accuracy"] == 1.0
