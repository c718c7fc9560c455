"""The files of versions that `make` installs by: they hold every requirement, within its range, and name no host."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.compile(r"([a-z0-9-]+)==([0-9][0-9a-z.+]*)( ; .*)?")
EXTRAS = {"", "all", "dev"}


def requirements() -> list[Requirement]:
    wanted = [Requirement(line) for line in metadata.requires("layerfuse") or ()]
    names = EXTRAS | {extra for one in wanted if one.name == "layerfuse" for extra in one.extras}
    return [
        one
        for one in wanted
        if one.name != "layerfuse" and any(one.marker is None or one.marker.evaluate({"extra": name}) for name in names)
    ]


@pytest.mark.parametrize("name", ["tested", "oldest"])
def test_every_requirement_has_versions_within_its_range(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pins = [PINNED.fullmatch(line) for line in lines]
    assert [line for line, pin in zip(lines, pins, strict=True) if pin is None] == []
    versions: dict[str, list[Version]] = {}
    for pin in pins:
        assert pin is not None
        versions.setdefault(pin[1], []).append(Version(pin[2]))
    wanted = requirements()
    assert len(wanted) > 20
    for one in wanted:
        found = versions.get(canonicalize_name(one.name), [])
        assert found, f"requirements/{name}.txt lacks {one.name}: run `make versions`"
        assert all(version in one.specifier for version in found), f"{one}: {name}.txt has {found}; run `make versions`"


@pytest.mark.parametrize(("package", "version"), [("torch", "2.11"), ("transformers", "5.17")])
def test_the_oldest_versions_are_the_lowest_that_are_allowed(package: str, version: str) -> None:
    (wanted,) = {str(one.specifier) for one in requirements() if one.name == package}
    assert f">={version}" in wanted.split(",")
    oldest = (ROOT / "requirements" / "oldest.txt").read_text(encoding="utf-8")
    assert re.search(rf"^{package}=={re.escape(version)}(\.0)*$", oldest, re.MULTILINE)
