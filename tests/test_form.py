"""The rules of form that a reader relies on, read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.source_support import BY_MODULE, EVERYTHING, LIBRARY, Source, assert_none, name_of, offenders, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
BUILT_IN_ERRORS = {
    *("ValueError", "TypeError", "KeyError", "OSError", "FileNotFoundError", "FileExistsError", "NotADirectoryError"),
    *("PermissionError", "ImportError", "ModuleNotFoundError", "Exception"),
}
COMMAND_LINE = re.compile(r".*/(__main__|cli/\w+)\.py")


def test_files_have_at_most_400_lines() -> None:
    def check(source: Source) -> Iterator[str]:
        lines = source.text.count("\n")
        if lines > MAX_FILE_LINES:
            yield f"{source.relative}: {lines} lines"

    assert_none(offenders(check, EVERYTHING), f"split files of more than {MAX_FILE_LINES} lines:")


def test_functions_have_at_most_60_lines_below_their_docstring() -> None:
    def check(source: Source) -> Iterator[str]:
        for node in ast.walk(source.tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (node.end_lineno or node.lineno) - body[0].lineno + 1 if body else 0
            if lines > MAX_FUNCTION_LINES:
                yield source.where(node.lineno, f"{node.name} has {lines} lines")

    assert_none(offenders(check, EVERYTHING), f"split functions of more than {MAX_FUNCTION_LINES} lines:")


def test_every_module_says_what_it_is() -> None:
    files = [*LIBRARY, *sources("examples")]
    missing = [source.relative for source in files if not ast.get_docstring(source.tree)]
    assert_none(missing, "a module docstring is missing in:")


def test_library_code_does_not_print() -> None:
    def check(source: Source) -> Iterator[str]:
        if COMMAND_LINE.fullmatch(source.relative):
            return
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and name_of(node.func) == "print":
                yield source.where(node.lineno, "print(")

    assert_none(offenders(check, LIBRARY), "log instead of printing; only command-line files print:")


def test_errors_that_users_cause_are_a_class_of_their_own() -> None:
    def check(source: Source) -> Iterator[str]:
        if source.module == "layerfuse.errors":
            return
        for node in ast.walk(source.tree):
            raised = node.exc.func if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
            if raised is not None and name_of(raised) in BUILT_IN_ERRORS:
                yield source.where(node.lineno, f"raises {name_of(raised)}")

    assert_none(offenders(check, LIBRARY), "raise the class of layerfuse.errors that is also this one:")


def test_public_modules_define_all_and_it_is_true() -> None:
    def check(source: Source) -> Iterator[str]:
        if source.path.name.startswith("_") and source.path.name != "__init__.py":
            return
        defined = _defined(source.tree)
        if source.exported is None:
            public = sorted(name for name in defined - _imported(source.tree) if not name.startswith("_"))
            if public:
                yield f"{source.relative}: no __all__, but it defines {', '.join(public)}"
            return
        if "__getattr__" in defined:  # lazy names; tests/test_imports.py asks for each
            return
        for name in sorted(source.exported - defined):
            if f"{source.module}.{name}" not in BY_MODULE:
                yield f"{source.relative}: __all__ names {name}, which is not defined there"

    assert_none(offenders(check, LIBRARY), "public names stand in __all__:")


# Every command has its `main`; dry_run's `render` is a public name of 0.1.
SHARED_NAMES = {"main", "render"}


def test_no_two_public_classes_or_functions_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for source in sources("integrations/llava", "tools"):
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(source.relative)
    assert len(places) > 200
    twice = [f"{name}: {', '.join(files)}" for name, files in places.items() if len(files) > 1]
    assert_none([line for line in twice if line.partition(":")[0] not in SHARED_NAMES], "rename one of:")


def _imported(tree: ast.Module) -> set[str]:
    return {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


def _defined(tree: ast.Module) -> set[str]:
    names = _imported(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return names


def test_nothing_is_called_gamma_or_beta() -> None:
    """Loaders rename parameters of these names (gamma → weight, beta → bias), so no module and no argument has them."""
    word = re.compile(r"(^|_)(gamma|beta)s?\d*($|_)")

    def check(source: Source) -> Iterator[str]:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and word.search(node.attr):
                yield source.where(node.lineno, node.attr)
            if isinstance(node, ast.arg) and word.search(node.arg):
                yield source.where(node.lineno, node.arg)

    assert_none(offenders(check, sources("layerfuse", "integrations")), "choose another name for:")


def test_nothing_catches_exception_broadly() -> None:
    def check(source: Source) -> Iterator[str]:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or name_of(node.type) in {"Exception", "BaseException"}
            ):
                yield source.where(node.lineno, "broad except")

    assert_none(offenders(check, LIBRARY), "catch what can be handled, by name:")


def test_layerfuse_passes_no_kwargs_through() -> None:
    def check(source: Source) -> Iterator[str]:
        for node in ast.walk(source.tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.args.kwarg is None:
                continue
            # Taking arguments in order to ignore them, or to note what a constructor gets, is another thing than
            # passing them on.
            kwargs = node.args.kwarg.arg
            if node.name != "__new__" and any(name_of(inner) == kwargs for inner in ast.walk(node)):
                yield source.where(node.lineno, f"{node.name}(**{kwargs})")

    assert_none(offenders(check, sources("layerfuse")), "name the arguments:")
