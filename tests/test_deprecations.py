"""The rule that our code asks for nothing deprecated, and that whatever a library logs as such fails its test."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = "from tests.deprecations import pytest_runtest_call, pytest_runtest_setup\n"
# `call` gives a function that stands in a file of its own and calls another function.
TESTS = """
import logging, warnings
from pathlib import Path
import pytest

def call(function, file, name="library"):
    space = {"function": function, "__name__": name}
    exec(compile("def caller():\\n    function()", file, "exec"), space)
    return space["caller"]

def warn(category=DeprecationWarning):
    code = compile("def f():\\n    warnings.warn('old', category)", "library.py", "exec")
    exec(code, space := {"warnings": warnings, "category": category, "__name__": "library"})
    return space["f"]

OURS = str(Path(__file__).parent / "layerfuse" / "files.py")

def test_fails_where_we_ask():
    call(warn(), OURS, "layerfuse.files")()

def test_fails_deep_in_the_library():
    call(call(call(warn(FutureWarning), "inner.py"), "torch.py", "torch.nn"), OURS, "layerfuse.files")()

def test_passes_where_another_library_asks():
    call(call(warn(), "other.py", "other"), OURS, "layerfuse.files")()

def test_passes_where_torch_asks_python():
    fork = compile("def f():\\n    warnings.warn('fork', DeprecationWarning)", "popen_fork.py", "exec")
    exec(fork, space := {"warnings": warnings, "__name__": "multiprocessing.popen_fork"})
    call(call(space["f"], "dataloader.py", "torch.utils.data"), OURS, "layerfuse.files")()

def test_fails_where_we_ask_python():
    asked = compile("def f():\\n    warnings.warn('old', DeprecationWarning)", "locale.py", "exec")
    exec(asked, space := {"warnings": warnings, "__name__": "locale"})
    call(space["f"], OURS, "layerfuse.files")()

def test_passes_where_a_test_asks():
    warn()()

@pytest.mark.parametrize("again", [1, 2])
def test_fails_for_a_record(again):
    from transformers.utils import logging
    logging.get_logger("transformers.x").warning_once("`y` is Deprecated")

def test_passes_where_a_pipeline_asks():
    from transformers.utils import logging
    logger = logging.get_logger("transformers.x")
    record = lambda: logger.warning("`z` is deprecated")
    call(call(record, OURS, "layerfuse.files"), "base.py", "transformers.pipelines.base")()

def test_passes_for_another_record():
    logging.getLogger("transformers.x").warning("`y` is new")

@pytest.fixture
def fixture():
    call(warn(), OURS, "layerfuse.files")()

def test_fails_for_its_fixture(fixture):
    pass
"""


def test_what_is_deprecated_fails_the_test_that_caused_it(root: Path, tmp_path: Path) -> None:
    # A package, since some library installs one of the same name; what is ours lies beside it.
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    shutil.copyfile(root / "tests" / "deprecations.py", tmp_path / "tests" / "deprecations.py")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_all.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "."]
    environment = {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) test_all.py::test_(passes|fails)", result.stdout, re.MULTILINE)
    assert sorted(set(outcomes)) == [("ERROR", "fails"), ("FAILED", "fails"), ("PASSED", "passes")], result.stdout
    assert len(outcomes) == 11
    assert "layerfuse/files.py:2: DeprecationWarning: old" in result.stdout
    assert "transformers.x logged: `y` is Deprecated" in result.stdout
