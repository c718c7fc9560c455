"""Requests to stop: handlers that are put back, the first Ctrl-C, the second."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import dump_recipe
from integrations.llava.training.run_folder import RunFolder
from integrations.llava.training.signals import RunInterrupted, StopRequest, stop_requests
from tests.integrations.llava.training.process_pairs import Alone, Nursery
from tests.integrations.llava.training.test_resume import both_stages


def test_handlers_of_signals_are_put_back_whatever_happens() -> None:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        expected = [signal.getsignal(number) for number in numbers]
        with pytest.raises(MemoryError), stop_requests() as request:
            assert [signal.getsignal(number) for number in numbers] == [request] * 3
            raise MemoryError
        assert [signal.getsignal(number) for number in numbers] == expected
        with stop_requests():
            os.kill(os.getpid(), signal.SIGINT)
            # The next one is the system's own: it kills at once.
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_request_where_nothing_is_to_be_saved_ends_the_run_at_once() -> None:
    request = StopRequest()
    with pytest.raises(RunInterrupted, match="nothing had to be saved"), request.at_once():
        request(signal.SIGTERM, None)
    with pytest.raises(RunInterrupted) as stop, request.at_once():
        raise AssertionError("not reached")
    assert stop.value.exit_code == 75


@contextmanager
def _long_run(recipe: Recipe, folder: Path, nursery: Nursery) -> Iterator[Alone]:
    """A training from the command line that has made its first step."""
    (folder / "recipe.yaml").write_text(dump_recipe(both_stages(recipe, max_steps=2000, log_every=1, num_workers=1)))
    command = ["train", "--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "run")]
    with nursery.alone("distributed_worker:command", command) as process:
        while not (folder / "run" / "metrics.jsonl").is_file():
            assert process.runs(), process.wait()
            time.sleep(0.02)
        yield process


def test_the_first_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(
    tiny_recipe: Recipe, nursery: Nursery, tmp_path: Path
) -> None:
    """Sent to the whole group, loaders included, as a terminal does."""
    with _long_run(tiny_recipe, tmp_path, nursery) as process:
        process.send(signal.SIGINT, group=True)
        ended = process.wait()

    assert ended.code == 130, ended
    assert "start the same command again to go on" in ended.output and "Traceback" not in ended.output
    assert RunFolder(tmp_path / "run").checkpoint("pretrain") is not None


def test_a_second_ctrl_c_kills_at_once(tiny_recipe: Recipe, nursery: Nursery, tmp_path: Path) -> None:
    with _long_run(tiny_recipe, tmp_path, nursery) as process:
        process.send(signal.SIGSTOP)  # so that both come within one step
        process.send(signal.SIGINT)
        process.send(signal.SIGCONT)
        deadline = time.monotonic() + 30
        while process.runs() and time.monotonic() < deadline:
            process.send(signal.SIGINT)
            time.sleep(0.001)
        ended = process.wait()

    assert ended.code == -signal.SIGINT, ended
    assert not [*(tmp_path / "run").glob("*/.saving/trained.safetensors.part")]
