"""What all tests share: the goldens' folder, Hypothesis settings, one thread a worker, little to collect."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Hooks: they count for all tests by standing here.
from tests.deprecations import pytest_runtest_call, pytest_runtest_setup  # noqa: F401

# Read by huggingface_hub when it is first imported: a test that asks the hub fails at once instead of retrying.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(os.environ.get("LAYERFUSE_GOLDENS", ROOT.parent / "shared" / "goldens"))
REQUIRE_GOLDENS = os.environ.get("LAYERFUSE_REQUIRE_GOLDENS", "") not in ("", "0")

# First calls compile or build models: a deadline per example would measure that and nothing else.
settings.register_profile("layerfuse", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("layerfuse")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The recorded inputs and outputs of the published code."""
    if not GOLDENS.is_dir():
        pytest.skip(f"goldens not found at {GOLDENS}; set LAYERFUSE_GOLDENS to their folder")
    return GOLDENS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: each training and compilation asks for whole ones."""
    gc.collect()
    gc.freeze()


def _fail_if_goldens_skipped(report: pytest.TestReport | pytest.CollectReport, name: str) -> None:
    if not (REQUIRE_GOLDENS and report.outcome == "skipped"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if "goldens" in f"{name} {reason}".lower():
        report.outcome = "failed"
        report.longrepr = f"{name}: skipped, but LAYERFUSE_REQUIRE_GOLDENS is set: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where goldens are required (`.ci/run`), a golden test that was skipped has failed."""
    report = yield
    _fail_if_goldens_skipped(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself while it is collected."""
    report = yield
    _fail_if_goldens_skipped(report, collector.nodeid)
    return report
