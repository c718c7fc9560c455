"""Print how far timm, open_clip and transformers agree where they compute with the same weights, as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from tools.library_parity.architectures import ARCHITECTURES, FULL_SIZE, PUBLISHED
from tools.library_parity.comparison import Agreement, compare_backbones, resized

_HEAD = """| architecture | libraries | layers | largest difference | share of the largest value |
|---|---|---|---|---|"""


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(prog="python -m tools.library_parity", description=__doc__)
    parser.add_argument("--full", action="store_true", help="three architectures at full width, four blocks each")
    full: bool = parser.parse_args().full
    found = []
    print(f"At the native size:\n\n{_HEAD}")
    for architecture in FULL_SIZE if full else ARCHITECTURES:
        agreements = compare_backbones(architecture.backbones(), architecture.size)
        found += agreements
        print(_row(architecture.name, agreements))
    print(f"\n{len(found)} pairs of libraries: {_row('all', found)}")
    if full:
        return
    print(f"\nAt another size, each pair alone:\n\n{_HEAD}")
    for architecture in ARCHITECTURES:
        for size in architecture.other_sizes:
            for agreement in compare_backbones(resized(architecture.backbones(), size), size):
                print(_row(f"{architecture.name}, {architecture.size} to {size}", [agreement]))
    print(f"\nAs configs are published, at the native size, each pair alone:\n\n{_HEAD}")
    for architecture in PUBLISHED:
        for agreement in compare_backbones(architecture.backbones(), architecture.size):
            print(_row(architecture.name, [agreement]))


def _row(name: str, agreements: Iterable[Agreement]) -> str:
    """One row: how many layers of pairs of libraries were compared, and the worst of them."""
    pairs = list(agreements)
    libraries = ", ".join(dict.fromkeys(library for pair in pairs for library in pair.libraries))
    layers = sum(len(pair.absolute) for pair in pairs)
    absolute = max(max(pair.absolute) for pair in pairs)
    relative = max(max(pair.relative) for pair in pairs)
    return f"| {name} | {libraries} | {layers} | {absolute:.1e} | {relative:.1e} |"


if __name__ == "__main__":
    main()
