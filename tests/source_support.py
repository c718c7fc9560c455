"""Reads the project's Python files as syntax trees, for the tests of architecture and form; nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Import:
    """One imported module, with the names taken from it."""

    module: str
    names: tuple[str, ...]
    line: int
    at_import: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """One Python file of the project."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def relative(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def module(self) -> str:
        return self.relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        return tuple(_imports(self.tree, self.module, is_package=self.path.name == "__init__.py"))

    @cached_property
    def exported(self) -> frozenset[str] | None:
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(name_of(target) == "__all__" for target in node.targets):
                return frozenset(_listed(self.tree, node.value))
        return None

    def where(self, line: int, what: str) -> str:
        return f"{self.relative}:{line}: {what}"


def _listed(tree: ast.Module, value: ast.expr) -> list[str]:
    """Read a list of names: a literal, or ``list(X)`` of a dictionary X with literal keys (names imported lazily)."""
    if not isinstance(value, ast.Call):
        names: list[str] = ast.literal_eval(value)
        return names
    source = ast.unparse(value.args[0])
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and name_of(node.targets[0]) == source:
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError(f"cannot read {ast.unparse(value)}")


def name_of(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Import]:
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(outer)
        for inner in ast.walk(outer)
    }
    parts = module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, id(node) not in lazy)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield Import(source, tuple(alias.name for alias in node.names), node.lineno, id(node) not in lazy)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def sources(*folders: str) -> list[Source]:
    """Python files under these folders of the project; a folder that is not there yet has none."""
    return [_source(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def _source(path: Path) -> Source:
    """Each file is read and parsed once."""
    return Source(path)


LIBRARY = sources("layerfuse", "integrations")
EVERYTHING = [*LIBRARY, *sources("examples", "tests", "benchmarks")]
BY_MODULE = {source.module: source for source in LIBRARY}


def third_party(source: Source, *, at_import_only: bool = False) -> list[Import]:
    """Imports of a file that are neither Python's own nor the project's."""
    known = {*sys.stdlib_module_names, "layerfuse", "integrations"}
    return [entry for entry in source.imports if entry.package not in known and (entry.at_import or not at_import_only)]


def own(source: Source, package: str = "layerfuse") -> Iterator[tuple[Import, str]]:
    """Imports of a file from the project, each as the deepest module it reaches."""
    for entry in source.imports:
        if entry.package != package:
            continue
        door = BY_MODULE.get(entry.module)
        exported = (door.exported if door and entry.module != source.module else None) or frozenset()
        # A name that a package exports is meant before its file of that name, but inside the package.
        names = [name for name in entry.names if name not in exported]
        deeper = [f"{entry.module}.{name}" for name in names if f"{entry.module}.{name}" in BY_MODULE]
        for module in deeper or [entry.module]:
            yield entry, module


def within(module: str, allowed: set[str]) -> bool:
    return any(module == entry or module.startswith(f"{entry}.") for entry in allowed)


def assert_none(offenders: list[str], rule: str) -> None:
    assert not offenders, rule + "\n  " + "\n  ".join(offenders)


def offenders(check: Callable[[Source], Iterator[str]], files: list[Source]) -> list[str]:
    return [line for source in files for line in check(source)]
