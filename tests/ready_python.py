"""A Python that has imported the libraries already, and none of ours: runs each program in a fork of itself.

`python ready_python.py` reads programs, lines of JSON, and answers each with a line: its exit code and what it said.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
import types
from pathlib import Path

_IMPORTED = ("torchvision", "timm", "open_clip", "transformers.modeling_utils", "torch._dynamo")
_PATIENCE = 600


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    answers = os.dup(1)
    os.dup2(2, 1)  # what others print is no answer
    for line in sys.stdin:
        # Files without names: what a fork does at its end would remove a temporary folder.
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            _, status = os.waitpid(_fork(*json.loads(line), (output.fileno(), errors.fileno())), 0)
            said = [os.pread(file.fileno(), 2**24, 0).decode(errors="replace") for file in (output, errors)]
        left = (json.dumps([os.waitstatus_to_exitcode(status), *said]) + "\n").encode()
        while left:
            left = left[os.write(answers, left) :]


def _fork(arguments: list[str], folder: str, said: tuple[int, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(_PATIENCE)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(said, start=1):
        os.dup2(file, number)
    faulthandler.enable(file=2)
    code = 1
    try:
        os.chdir(folder)
        _run(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(program: str, *arguments: str) -> None:
    """Run a file, or the code behind `-c`, as the main module."""
    if program == "-c":
        code, name, sys.path[0], rest = arguments[0], "<string>", "", arguments[1:]
    else:
        code, name, rest = Path(program).read_text(encoding="utf-8"), program, arguments
        sys.path[0] = str(Path(program).parent)
    sys.argv = [program, *rest]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__file__"] = name
    exec(compile(code, name, "exec", dont_inherit=True), main.__dict__)


if __name__ == "__main__":
    _serve()
