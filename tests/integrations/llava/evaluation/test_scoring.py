from __future__ import annotations

import pytest

from integrations.llava.evaluation import Question, blind_answers, score_answers, summarise


def questions() -> list[Question]:
    return [
        Question(0, "a.png", "How many?", "counting", "2"),
        Question(1, "a.png", "What color is the ring?", "color", "red"),
        Question(2, "b.png", "How many?", "counting", "3"),
    ]


def rows(*answers: str) -> list[dict[str, object]]:
    return [{"question_id": number, "prediction": answer} for number, answer in enumerate(answers)]


def test_answers_are_paired_by_id_whatever_their_order() -> None:
    scored = score_answers(questions(), reversed(rows("2", "blue", "3")))
    assert [answer.question.question_id for answer in scored] == [0, 1, 2]
    assert [answer.right for answer in scored] == [True, False, True]


def test_summary_averages_each_kind() -> None:
    table = summarise(score_answers(questions(), rows("2", "red", "9")))
    assert list(table) == ["counting", "color"]
    assert table["counting"].num_questions == 2
    assert table["counting"].accuracy == 0.5
    assert table["counting"].standard_error == pytest.approx((0.25 / 2) ** 0.5)
    assert table["color"].accuracy == 1.0


def test_row_holds_question_answer_and_scores() -> None:
    row = score_answers(questions(), rows("2", "red", "3"))[0].row()
    assert row["kind"] == "counting"
    assert row["prediction"] == "2"
    assert row["scores"] == {"accuracy": 1.0}


def test_missing_prediction_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"3 questions; question ids, 1 missing: 2\. Give exactly one"):
        score_answers(questions(), rows("2", "red"))


def test_repeated_prediction_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"question ids, 1 given more than once: 0\."):
        score_answers(questions(), [*rows("2", "red", "3"), *rows("2")])


def test_prediction_without_question_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"of no question: 3\."):
        score_answers(questions(), rows("2", "red", "3", "4"))


def test_long_lists_of_ids_are_cut() -> None:
    many = [Question(number, "a.png", "?", "color", "red") for number in range(12)]
    with pytest.raises(ValueError, match=r"12 missing: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … and 2 more"):
        score_answers(many, [])


def test_blind_answer_is_the_commonest_for_the_same_question() -> None:
    turns = [("How many?", "3"), ("How many?", "3"), ("How many?", "2"), ("What color is the ring?", "blue")]
    assert [row["prediction"] for row in blind_answers(questions(), turns)] == ["3", "blue", "3"]


def test_blind_answer_to_a_new_question_is_the_commonest_of_its_kind() -> None:
    asked = [*questions(), Question(3, "b.png", "How many now?", "counting", "1")]
    turns = [("How many?", "2"), ("How many?", "3")]
    assert [row["prediction"] for row in blind_answers(asked, turns)] == ["2", "", "2", "2"]


def test_ids_of_another_type_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"3 missing: 0, 1, 2; 3 of no question: '0', '1', '2'"):
        score_answers(questions(), [{**row, "question_id": str(row["question_id"])} for row in rows("2", "red", "3")])
