"""Who may import whom, and what stands in a registry's import lines; read from the source, nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.source_support import (
    BY_MODULE,
    LIBRARY,
    ROOT,
    Source,
    assert_none,
    offenders,
    own,
    sources,
    third_party,
    within,
)

FOUNDATION = {
    "layerfuse.errors": set(),
    "layerfuse.files": {"layerfuse.errors"},
    "layerfuse.features": {"layerfuse.errors", "layerfuse.files", "layerfuse.registry"},
    "layerfuse.registry": {"layerfuse.errors"},
    "layerfuse.argument_types": {"layerfuse.errors"},
    "layerfuse.layers": {"layerfuse.errors"},
    "layerfuse._block_lists": {"layerfuse.errors"},
    "layerfuse._block_stages": {"layerfuse.errors", "layerfuse._block_lists"},
    "layerfuse._tapped_layers": {"layerfuse.errors"},
    "layerfuse.taps": {
        "layerfuse.errors",
        "layerfuse.features",
        "layerfuse.layers",
        "layerfuse.registry",
        "layerfuse._block_lists",
        "layerfuse._block_stages",
        "layerfuse._tapped_layers",
    },
    "layerfuse.ops": {"layerfuse.errors", "layerfuse.features", "layerfuse.registry", "layerfuse.ops"},
}
FUSERS_MAY_IMPORT = {
    "layerfuse.argument_types",
    "layerfuse.errors",
    "layerfuse.features",
    "layerfuse.registry",
    "layerfuse.ops",
    "layerfuse.fusers.base",
}
STDLIB_FREE = {"torch", "einops"}
# Kernels are decorated by Triton, so their module imports it; that module is imported where a kernel is launched.
TRITON_KERNELS = "layerfuse.ops.deformable._triton_kernels"


def test_the_library_is_found() -> None:
    assert {"layerfuse", "layerfuse.features", "layerfuse.taps", "layerfuse.registry"} <= set(BY_MODULE)


@pytest.mark.parametrize("part", sorted(FOUNDATION))
def test_foundation_imports_torch_at_most(part: str) -> None:
    def check(source: Source) -> Iterator[str]:
        for entry in third_party(source, at_import_only=True):
            if entry.package not in ({"triton"} if source.module == TRITON_KERNELS else {"torch"}):
                yield source.where(entry.line, f"imports {entry.module}")
        for entry, module in own(source):
            if module == TRITON_KERNELS and entry.at_import:
                yield source.where(entry.line, f"imports {module} when it is imported")
            if not within(module, FOUNDATION[part]):
                yield source.where(entry.line, f"imports {module}")

    files = [source for source in LIBRARY if within(source.module, {part})]
    assert files
    assert_none(offenders(check, files), f"{part} may import torch and {sorted(FOUNDATION[part])}:")


def test_layerfuse_never_imports_integrations() -> None:
    def check(source: Source) -> Iterator[str]:
        for entry, module in own(source, "integrations"):
            yield source.where(entry.line, f"imports {module}")

    assert_none(offenders(check, sources("layerfuse")), "layerfuse knows nothing of integrations:")


def test_backbones_import_their_library_inside_functions_only() -> None:
    def check(source: Source) -> Iterator[str]:
        for entry in third_party(source, at_import_only=True):
            if entry.package not in {"torch", "numpy", "PIL"}:
                yield source.where(entry.line, f"imports {entry.module} when it is imported")

    assert_none(offenders(check, sources("layerfuse/backbones")), "import a family's library where it is used:")


def test_backbones_import_no_fuser() -> None:
    def check(source: Source) -> Iterator[str]:
        for entry, module in own(source):
            if within(module, {"layerfuse.fusers", "layerfuse.encoder"}):
                yield source.where(entry.line, f"imports {module}")

    assert_none(offenders(check, sources("layerfuse/backbones")), "a backbone knows nothing of fusers:")


def test_fusers_import_neither_backbones_nor_one_another() -> None:
    def check(source: Source) -> Iterator[str]:
        if source.path.name == "__init__.py":
            return
        for entry, module in own(source):
            if not within(module, FUSERS_MAY_IMPORT):
                yield source.where(entry.line, f"imports {module}")
        for entry in third_party(source):
            if entry.package not in STDLIB_FREE:
                yield source.where(entry.line, f"imports {entry.module}")

    rule = f"a fuser may import {sorted(STDLIB_FREE)} and {sorted(FUSERS_MAY_IMPORT)}:"
    assert_none(offenders(check, sources("layerfuse/fusers")), rule)


def test_integrations_use_public_names_of_layerfuse_only() -> None:
    def check(source: Source) -> Iterator[str]:
        for entry in source.imports:
            if entry.package != "layerfuse":
                continue
            private = [part for part in (*entry.module.split("."), *entry.names) if part.startswith("_")]
            if private and private != ["__version__"]:
                yield source.where(entry.line, f"takes {', '.join(private)} from {entry.module}")
            target = BY_MODULE.get(entry.module)
            exported = target.exported if target is not None else None
            for name in entry.names:
                if exported is not None and name not in exported and f"{entry.module}.{name}" not in BY_MODULE:
                    yield source.where(entry.line, f"{name} is not in {entry.module}.__all__")

    assert_none(offenders(check, sources("integrations", "examples")), "use public names of layerfuse:")


# The rooms of integrations.llava


LLAVA = "integrations.llava"
RANKS = {
    "_files": 0,
    "_text": 0,
    "config": 1,
    "prompts": 1,
    "image_layout": 1,
    "data": 2,
    "modeling": 2,
    "checkpoints": 3,
    "training": 4,
    "dry_run": 4,
    "inference": 4,
    "evaluation": 5,
    "harness": 5,
    "study": 6,
    "cli": 7,
}
FORBIDDEN = {("checkpoints", "data"), ("evaluation", "training"), ("evaluation", "dry_run")}


def room(module: str) -> str:
    """Name of the package or file below integrations.llava that a module belongs to; of the package itself ""."""
    return module.removeprefix(LLAVA).lstrip(".").partition(".")[0]


def forbidden(importer: str, imported: str) -> bool:
    """Whether a room may not import another, which rooms of one rank may never do."""
    if importer == "synthetic":
        return imported not in {"synthetic", "prompts"}
    if imported == "synthetic":
        return RANKS[importer] < RANKS["study"]
    return RANKS[imported] >= RANKS[importer] or (importer, imported) in FORBIDDEN


def test_every_room_has_its_rank() -> None:
    folder = ROOT / "integrations" / "llava"
    rooms = {path.name for path in folder.iterdir() if (path / "__init__.py").exists()} | {
        path.stem for path in folder.glob("*.py")
    }
    assert rooms == {*RANKS, "synthetic", "__init__", "__main__"}


def test_rooms_import_rooms_of_lower_rank_only() -> None:
    def check(source: Source) -> Iterator[str]:
        here = room(source.module)
        for entry, module in own(source, "integrations"):
            there = room(module)
            if here not in {there, "", "__main__"} and forbidden(here, there):
                yield source.where(entry.line, f"{here} imports {there} ({module})")

    assert_none(offenders(check, sources("integrations")), f"a room imports those of lower rank, {RANKS}:")


def test_other_rooms_are_entered_through_their_door() -> None:
    """Files of another package are named through its ``__init__.py``: absolute across rooms, relative inside one."""

    def check(source: Source) -> Iterator[str]:
        for node in ast.walk(source.tree):
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            for module in _targets(source, node):
                inside = room(module) == room(source.module)
                if not inside and BY_MODULE[module].path.name != "__init__.py" and module.count(".") > 2:
                    yield source.where(node.lineno, f"names the file {module}")
                if source.module != LLAVA and relative != inside:
                    yield source.where(node.lineno, f"imports {module} {'relatively' if relative else 'absolutely'}")

    assert_none(offenders(check, sources("integrations")), "enter a room through its __init__.py:")


@pytest.mark.parametrize("package", ["layerfuse", "integrations"])
def test_no_import_goes_in_a_circle(package: str) -> None:
    """Imports inside functions count, too."""
    edges = {
        source.module: {module for _, module in own(source, package) if module in BY_MODULE}
        for source in sources(package)
    }
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> Iterator[str]:
        if module in path:
            yield " -> ".join((*path[path.index(module) :], module))
        elif module not in done:
            for target in sorted(edges[module]):
                yield from walk(target, (*path, module))
            done.add(module)

    assert len(edges) > 20
    assert_none([circle for module in sorted(edges) for circle in walk(module, ())], "imports go in a circle:")


def _targets(source: Source, node: ast.AST) -> list[str]:
    """Modules of integrations that a node imports, each as the deepest one that is named."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return []
    return [module for entry, module in own(source, "integrations") if entry.line == node.lineno]


def test_integrations_is_a_namespace_folder() -> None:
    assert not (ROOT / "integrations" / "__init__.py").exists()


def test_declared_dependencies_are_those_that_are_imported() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core, extra = (_requirements(text, key) for key in ("dependencies", "llava"))
    extra |= {"transformers"}.union(
        *(_requirements(text, key) for key in ("lora", "quantize", "deepspeed", "parquet", "excel", "eval"))
    )
    used = {package: _distributions(sources(package)) for package in ("layerfuse", "integrations")}
    optional = {"open_clip_torch", "transformers", "matplotlib"}  # imported where they are used, each an extra
    optional |= {"triton"}  # comes with torch's CUDA builds for Linux
    assert used["layerfuse"] - core == optional
    # transformers brings tokenizers, jinja2 brings markupsafe.
    assert used["integrations"] - core - extra <= {"tokenizers", "markupsafe"}
    assert core - used["layerfuse"] == {"torchvision"}  # timm does not import without it


def _distributions(files: list[Source]) -> set[str]:
    names = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image", "open_clip": "open_clip_torch"}
    names["lmms_eval"] = "lmms-eval"
    return {names.get(entry.package, entry.package) for source in files for entry in third_party(source)}


def _requirements(text: str, key: str) -> set[str]:
    """Names of the distributions in a list of pyproject.toml; Python 3.10 has no tomllib."""
    block = re.search(rf"^{key} = \[(.*?)\](?: #.*)?$", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return set(re.findall(r'^\s*"([A-Za-z0-9_.-]+)', block[1], re.MULTILINE))


# One file plus one import line


@pytest.mark.parametrize("package", ["layerfuse/fusers", "layerfuse/backbones", "integrations/llava/image_layout"])
def test_every_file_of_a_registry_has_its_import_line(package: str) -> None:
    init = BY_MODULE[package.replace("/", ".")]
    imported = {entry.module for entry in init.imports}
    imported |= {f"{entry.module}.{name}" for entry in init.imports for name in entry.names}
    missing = [
        source.relative
        for source in sources(package)
        if not source.path.name.startswith("_") and source.module not in imported
    ]
    assert_none(missing, f"{init.relative} lacks the import line of:")


def test_every_task_has_its_import_line() -> None:
    imported = {
        entry.module
        for init in sources("integrations/llava/evaluation/tasks")
        if init.path.name == "__init__.py"
        for entry in init.imports
    }
    missing = [
        source.relative
        for source in sources("integrations/llava/evaluation")
        if "@TASKS.register(" in source.text and source.module not in imported
    ]
    assert_none(missing, "the __init__.py beside it lacks the import line of:")


# How many tokens an image takes


def test_nobody_but_the_config_reads_the_number_of_image_tokens() -> None:
    """Who counts asks `config.layout`; saying the number to a config that stores it (a keyword) is no reading."""

    def check(source: Source) -> Iterator[str]:
        if source.module == "integrations.llava.modeling.configuration":
            return
        for node in ast.walk(source.tree):
            reads = isinstance(node, ast.Attribute) and node.attr == "image_seq_length"
            if reads or (isinstance(node, ast.Constant) and node.value == "image_seq_length"):
                yield source.where(node.lineno, "reads image_seq_length")

    assert_none(offenders(check, sources("integrations")), "ask the layout (config.layout.num_tokens):")


def test_the_image_layout_knows_neither_model_nor_data() -> None:
    def check(source: Source) -> Iterator[str]:
        for entry, module in own(source, "integrations"):
            if not within(module, {"integrations.llava.image_layout"}):
                yield source.where(entry.line, f"imports {module}")
        for entry in third_party(source):
            yield source.where(entry.line, f"imports {entry.module}")

    files = sources("integrations/llava/image_layout")
    assert files
    assert_none(offenders(check, files), "image_layout imports the standard library and layerfuse:")


# One of each


# The photographs are files of scikit-image's wheel, not a user's; synthetic imports no data.
OPENS_IMAGES = {"integrations.llava.data.images", "integrations.llava.synthetic.photographs"}
READS_JSON_LINES = {"integrations.llava._files", "integrations.llava.data.files"}


def test_images_are_opened_in_one_place() -> None:
    def check(source: Source) -> Iterator[str]:
        for node in ast.walk(source.tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.endswith("Image.open") and source.module not in OPENS_IMAGES:
                yield source.where(node.lineno, called)

    assert_none(offenders(check, sources("integrations")), "open images with integrations.llava.data.read_image:")


def test_json_lines_are_read_in_one_place() -> None:
    """`_files.json_lines`, and for data sets, which are read by index, `data.SampleFile`."""

    def check(source: Source) -> Iterator[str]:
        loops = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        for loop in ast.walk(source.tree):
            for node in ast.walk(loop) if isinstance(loop, loops) else ():
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if called == "json.loads" and source.module not in READS_JSON_LINES:
                    yield source.where(node.lineno, called)

    assert_none(offenders(check, sources("integrations")), "read JSON lines with integrations.llava._files.json_lines:")
