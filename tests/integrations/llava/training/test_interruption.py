"""Requests to stop: handlers that are put back, the first Ctrl-C, the second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import dump_recipe
from integrations.llava.training.run_folder import RunFolder
from integrations.llava.training.signals import RunInterrupted, StopRequest, stop_requests
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


def _long_run(recipe: Recipe, folder: Path, root: Path) -> subprocess.Popen[str]:
    (folder / "recipe.yaml").write_text(dump_recipe(both_stages(recipe, max_steps=2000, log_every=1, num_workers=1)))
    command = ["-m", "integrations.llava", "train", "--recipe", str(folder / "recipe.yaml")]
    process = subprocess.Popen(
        [sys.executable, *command, "--output", str(folder / "run")],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell has jobs in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (folder / "run" / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    return process


def test_the_first_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(
    tiny_recipe: Recipe, root: Path, tmp_path: Path
) -> None:
    """Sent to the whole group, loaders included, as a terminal does."""
    process = _long_run(tiny_recipe, tmp_path, root)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 130, output
    assert "start the same command again to go on" in output and "Traceback" not in output
    assert RunFolder(tmp_path / "run").checkpoint("pretrain") is not None


def test_a_second_ctrl_c_kills_at_once(tiny_recipe: Recipe, root: Path, tmp_path: Path) -> None:
    process = _long_run(tiny_recipe, tmp_path, root)
    process.send_signal(signal.SIGSTOP)  # so that both come within one step
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)

    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert not [*(tmp_path / "run").glob("*/.saving/trained.safetensors.part")]
