"""What a library calls deprecated fails the test in which our code asked for it.

Two ways lead here. A warning (DeprecationWarning, FutureWarning) counts where the frame that called into the warning
library is ours, however deep inside the library the warning is raised; what libraries ask of one another is theirs to
mend. A log record of the libraries below counts whoever caused it, since it is what a user would read; but for what a
library's own callers of a model ask of it, through whatever lies between.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_OURS = tuple(f"{_ROOT / folder}/" for folder in ("layerfuse", "integrations"))
_STANDARD = "python"
_CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
# Before 5.20, pipelines of transformers pass `generate` what it calls deprecated.
_CALLERS = ("transformers.pipelines.",)
_LOGGERS = ("transformers", "accelerate", "huggingface_hub", "torch", "timm", "open_clip", "peft")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Watch fixtures; one that is shared fails the first test that asks for it."""
    with _watched():
        return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Watch the test itself."""
    with _watched():
        return (yield)


@contextmanager
def _watched() -> Iterator[None]:
    found: list[str] = []
    show = warnings.showwarning

    def look(message: Warning | str, category: type[Warning], *place: object) -> None:
        if not issubclass(category, _CATEGORIES):
            show(message, category, *place)  # type: ignore[arg-type]
        elif caller := _own_caller(sys._getframe(1)):
            found.append(f"{caller}: {category.__name__}: {message}")

    handler = _Records(found)
    with warnings.catch_warnings():
        warnings.showwarning = look
        for category in _CATEGORIES:
            warnings.simplefilter("always", category)
        _say_again()
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(handler)
        try:
            yield
        finally:
            for name in _LOGGERS:
                logging.getLogger(name).removeHandler(handler)
    if found:
        pytest.fail("deprecated:\n" + "\n".join(dict.fromkeys(found)), pytrace=False)


class _Records(logging.Handler):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in (message := record.getMessage()).lower() and not _asked_by_a_library(sys._getframe(1)):
            self._found.append(f"{record.name} logged: {message}")


def _say_again() -> None:
    """Make the libraries forget what they have said once, which would hide it from all tests but the first."""
    for module, owner in (("transformers.utils.logging", None), ("accelerate.logging", "MultiProcessAdapter")):
        if module in sys.modules:
            place = sys.modules[module] if owner is None else getattr(sys.modules[module], owner)
            place.warning_once.cache_clear()


def _asked_by_a_library(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_CALLERS):
            return True
        frame = frame.f_back
    return False


def _own_caller(frame: FrameType | None) -> str | None:
    """Name the line of ours that called into the library that warns; None if another library did."""
    library = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS):
            return f"{Path(file).relative_to(_ROOT)}:{frame.f_lineno}"
        name = str(frame.f_globals.get("__name__", ""))
        package = name.partition(".")[0]
        if package in sys.stdlib_module_names:
            package = _STANDARD
        if name != "warnings":
            library = library or package
            # Python and torch stand between us and what they decorate or call as a module. What torch itself asks of
            # Python, such as a fork beside threads, is not ours.
            passes = {_STANDARD} if library == _STANDARD else {_STANDARD, "torch"}
            if package not in {library, *passes}:
                return None
        frame = frame.f_back
    return None
