from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from integrations.llava.cli.demo import table
from integrations.llava.evaluation import score_answers, summarise
from integrations.llava.study.report import render_maps, render_report
from integrations.llava.study.results import DemoResults
from integrations.llava.study.statistics import AVERAGE, baseline, conclude, differences, estimate, explain_layer_zero
from tests.integrations.llava.study.made_up import KINDS, make_questions, make_results, make_run

VOID = {"meta", "img", "input", "br", "hr", "link"}


class Balance(HTMLParser):
    """Collects tags that are closed in the wrong order, and section ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.sections: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(dict(attrs)["id"] or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def read(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    assert not parser.faults
    assert not parser.open
    return parser


def test_full_report_is_balanced_and_has_every_section() -> None:
    sections = read(render_report(make_results())).sections
    assert sections == ["results", "examples", "photo", "probe", "maps", "losses", "cost", "origin"]


def test_report_without_pictures_and_probes_leaves_those_sections_out() -> None:
    assert read(render_report(make_results(complete=False))).sections == ["results", "losses", "cost", "origin"]


def test_report_shows_every_fuser_kind_and_number(tmp_path: Path) -> None:
    results = make_results({"select": 0.5, "average": 0.55, "concat": 0.7, "mmfuser": 0.45}, seeds=(0, 1, 2))
    page = render_report(results)
    for fuser in results.fusers:
        assert f"</svg>{fuser}</span>" in page
        for kind in KINDS:
            mean = estimate([run.kinds[kind].accuracy for run in results.of(fuser)]).mean
            assert f'<span class="value">{100 * mean:.1f}</span>' in page
    assert "20 questions" in page
    assert "standard deviation" in page
    assert "<td>35.0</td>" in page  # chance of counting


def test_tables_make_room_for_the_longest_fuser() -> None:
    page = render_report(make_results({"select": 0.5, "depth_attention": 0.6}))
    assert 'style="--letters:15"' in page
    results = make_results()
    panel = replace(results.figures[0].panels[0], title="output of depth_attention")
    page = render_report(replace(results, figures=[replace(results.figures[0], panels=[panel])]))
    assert "<figcaption>output of depth_<wbr>attention</figcaption>" in page


def test_maps_of_a_kind_stand_under_one_heading_and_alone_as_in_the_report() -> None:
    results = make_results()
    section = render_maps(results.figures)
    assert section in render_report(results)
    assert re.findall("<h3>(.*)</h3>", section) == [
        "Which characters and shapes can still be read",
        "What layers and fusers see",
        "What depth_attention takes of each layer",
        "Where mmfuser looks",
    ]
    assert section.count('class="panels layers"') == 2
    assert section.count('class="over"') == 5  # the second panel of each figure lies over a picture, too


def test_what_is_said_of_layer_0_follows_from_the_probes() -> None:
    results = make_results()
    probe, other = results.probes
    best = [probe, replace(other, layers={layer: 0.981 - 0.1 * layer for layer in range(7)})]
    said = " ".join(explain_layer_zero(replace(results, probes=best)))
    assert said.startswith(
        "What a probe reads of layer 0, the embeddings, and of layer 1 in brackets: character 90 % (88 %), colour "
        "98 % (88 %). "
        "No fuser taps it all the same. An embedding is linear in the pixels of its own patch"
    )
    assert "answered 76.3 % right with layer 0 as a sixth layer and 73.6 % without it (standard error" in said
    assert said in render_report(replace(results, probes=best)).replace("&#39;", "'")
    # The colour is read better later on, so that there is nothing to wonder about.
    assert "all the same" not in " ".join(explain_layer_zero(results))
    tapping = [replace(run, layers=(0, 1)) if run.fuser == "mmfuser" else run for run in results.runs]
    assert explain_layer_zero(replace(results, runs=tapping))[-1] == "Layer 0 is tapped by mmfuser."
    assert explain_layer_zero(make_results(complete=False)) == []


def test_text_from_outside_is_escaped() -> None:
    page = render_report(make_results())
    assert "What is &lt;this&gt;?" in page
    assert "<this>" not in page


def test_page_loads_nothing() -> None:
    page = render_report(make_results())
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "@import" not in page
    assert "url(" not in page


def test_verdict_follows_the_numbers_whoever_is_ahead() -> None:
    ahead = " ".join(conclude(make_results({"select": 0.2, "mmfuser": 0.9})))
    behind = " ".join(conclude(make_results({"select": 0.9, "mmfuser": 0.2})))
    assert "mmfuser is ahead of select by" in ahead
    assert "clearly better at" in ahead
    assert "clearly worse" not in ahead
    assert "mmfuser is behind select by" in behind
    assert "clearly worse at" in behind
    assert ahead.index("mmfuser") < ahead.index("select")
    assert behind.index("select") < behind.index("mmfuser")


def test_small_difference_is_not_called_one() -> None:
    sentences = conclude(make_results({"select": 0.5, "mmfuser": 0.52}))
    assert "not clearly different from it" in sentences[1]
    assert "on no kind of question" in sentences[1]
    assert 'Run SEEDS="0 1 2"' in sentences[-1]


def test_equal_fusers_are_called_equal() -> None:
    assert conclude(make_results({"select": 1.0, "mmfuser": 1.0}))[1] == (
        "mmfuser and select answer equally many questions of every kind right."
    )


def test_fusers_that_win_and_lose_alike_are_called_level() -> None:
    own = [make_questions(1)[0], make_questions(1)[1]]
    first, second = (
        score_answers(own, [{"question_id": 0, "prediction": a}, {"question_id": 1, "prediction": b}])
        for a, b in (("K7F", "9"), ("XXX", "3"))
    )
    runs = [
        replace(make_run(fuser, 0, 0.5), answers=answers, kinds=summarise(answers))
        for fuser, answers in (("select", first), ("mmfuser", second))
    ]
    assert "mmfuser is level with select on average" in conclude(DemoResults(runs=runs, chance={}))[1]


def test_single_fuser_is_compared_with_nothing() -> None:
    results = make_results({"concat": 0.5})
    assert differences(results) == []
    assert len(conclude(results)) == 2
    read(render_report(results))


def test_baseline_is_select_wherever_it_stands() -> None:
    assert baseline(make_results({"mmfuser": 0.5, "select": 0.5})) == "select"
    assert baseline(make_results({"mmfuser": 0.5, "concat": 0.5})) == "mmfuser"


def test_differences_are_paired_by_question_and_averaged_over_seeds() -> None:
    results = make_results({"select": 0.4, "mmfuser": 0.8}, seeds=(0, 1))
    found = {difference.kind: difference for difference in differences(results)}
    assert set(found) == {*KINDS, AVERAGE}
    accuracies = [[run.kinds["ocr"].accuracy for run in results.of(fuser)] for fuser in ("mmfuser", "select")]
    by_seed = [100 * (own - other) for own, other in zip(*accuracies, strict=True)]
    assert found["ocr"].by_seed == pytest.approx(by_seed)
    assert found["ocr"].points == pytest.approx(sum(by_seed) / 2)
    assert found[AVERAGE].points == pytest.approx(sum(found[kind].points for kind in KINDS) / 5)
    assert 0 < found[AVERAGE].error < found["ocr"].error


def test_estimate_has_a_spread_only_with_several_seeds() -> None:
    assert estimate([0.5]).spread is None
    assert estimate([0.4, 0.6]).mean == pytest.approx(0.5)
    assert estimate([0.4, 0.6]).spread == pytest.approx(0.02**0.5)


def test_terminal_table_has_fusers_kinds_and_chance() -> None:
    lines = table(make_results(seeds=(0, 1))).splitlines()
    assert lines[0].split() == ["fuser", *KINDS, "mean"]
    assert lines[1].split() == ["questions", *["20"] * 5]
    assert [line.split()[0] for line in lines[2:]] == ["select", "mmfuser", "without"]
    assert lines[2].count("±") == 6
    assert lines[-1].split()[2:] == ["0.0", "35.0", "20.0", "25.0", "1.0", "16.2"]


def test_rows_are_one_per_fuser_seed_and_kind() -> None:
    rows = make_results(seeds=(0, 1)).rows()
    assert len(rows) == 2 * 2 * 5
    assert rows[0]["commit"] == "abc1234"
    assert rows[0]["kind"] == "ocr"
    assert 0 <= rows[0]["character_accuracy"] <= 1
