"""A failure of one of two processes ends both within seconds, with its text: in every phase, whatever its class."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import dump_recipe
from integrations.llava.training.run_folder import RunFolder
from tests.integrations.llava.training.failing_worker import ERRORS, PLACES
from tests.integrations.llava.training.process_pairs import Ended, Nursery

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")

SECONDS = 20.0
USER = "BadSampleError"


def _cases() -> Iterator[tuple[str, int, str]]:
    """Three classes for every phase and process; all classes come up."""
    names = list(ERRORS)
    for number, (phase, failing) in enumerate((phase, failing) for phase in PLACES for failing in (0, 1)):
        for step in (0, 1, 3):
            yield phase, failing, names[(number + step) % len(names)]


def whole(ended: tuple[Ended, Ended]) -> str:
    """All that both processes said; of a failed assertion's values pytest shows the ends alone."""
    return "\n".join(f"{each}" for each in ended)


@pytest.fixture
def arguments(tiny_recipe: Recipe, tmp_path: Path) -> list[str]:
    """A command that trains one stage of two steps, with a checkpoint after each."""
    stage = dataclasses.replace(tiny_recipe.pretrain, max_steps=2, save_every=1, micro_batch_size=2, engine="ddp")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(dataclasses.replace(tiny_recipe, pretrain=stage)))
    return ["--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run"), "--stages", "pretrain"]


def test_every_process_ends_well_where_none_fails(nursery: Nursery, arguments: list[str], tmp_path: Path) -> None:
    ended = nursery.run("failing_worker:fail", arguments, "build", 2, "KeyError")

    assert [each.code for each in ended] == [0, 0], whole(ended)
    assert RunFolder(tmp_path / "run").finished == ("pretrain",)


@pytest.mark.parametrize(("phase", "failing", "error"), _cases())
def test_a_failure_in_any_phase_ends_every_process_with_its_text(
    phase: str, failing: int, error: str, nursery: Nursery, arguments: list[str]
) -> None:
    ended = nursery.run("failing_worker:fail", arguments, phase, failing, error)
    own, other = ended[failing], ended[1 - failing]

    # What a user can mend is said in one line; everything else keeps its traceback, where it happened.
    user = error == USER or (phase, failing, error) == ("finish", 0, "SafetensorError")
    user = user or (phase, failing, error) == ("checkpoint", 0, "SafetensorError")
    assert [own.code, other.code] == ([2, 2] if user else [1, 1]), whole(ended)
    assert abs(own.seconds - other.seconds) < SECONDS, whole(ended)
    assert "the coffee is cold" in own.output and "the coffee is cold" in other.output, whole(ended)
    assert ("Traceback" in own.output) is not user, whole(ended)
    said = f"process {failing}: " if user else f"process {failing} failed: {error}: "
    assert said in other.output, whole(ended)


@pytest.mark.parametrize("failing", [0, 1])
def test_every_process_ends_when_one_is_killed(failing: int, nursery: Nursery, arguments: list[str]) -> None:
    ended = nursery.run("failing_worker:killed", arguments, failing)

    assert (ended[failing].code, ended[1 - failing].code) == (-9, 1), whole(ended)
    assert abs(ended[0].seconds - ended[1].seconds) < SECONDS, whole(ended)
    assert "another process of this run ended without a word" in ended[1 - failing].output, whole(ended)


def test_a_failure_does_not_reach_into_what_the_processes_do_next(nursery: Nursery) -> None:
    """As a run that was stopped and goes on in the same processes; the thread of the first start may still look."""
    ended = nursery.run("failing_worker:again")

    assert [each.code for each in ended] == [0, 0], whole(ended)
