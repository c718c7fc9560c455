"""The page docs/models.md, made from the data alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tools.model_table.backbones import BACKBONE_ROWS
from tools.model_table.cells import ERROR, NO, YES, Outcome
from tools.model_table.data import TableData, TriedRow
from tools.model_table.fusers import CHANNELS, GRID, NUM_LAYERS

__all__ = ["PAGE_FILE", "model_page"]

PAGE_FILE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
# The sentence is the same for each size that was tried.
_ONE_SIZE = re.compile(r", so image_size=\(\d+, \d+\) is not possible")
_NO_BREAK = "\u00a0"
_SYMBOLS = {YES: "✓", NO: "no", ERROR: "✗", "any": "✓", "built": "b"}

_HEAD = """# The model table

Every cell was tried, on a model with random weights, by `python -m tools.model_table`, which writes this page;
`make check` tries some of them again, others each time, and says when the page is stale.
Tried with {versions}, on a CPU.

✓ works · no: is refused, with the sentence below the table · ✗ fails, for the reason below the table.

## Backbones

{count} architectures, each at its full width, cut to 4 blocks, of which layers 0, 2 and 3 are tapped. Of those wider
than 1,024, the second number is the width that was tried, with heads of the same size. [Backbones](backbones.md)
tells how they are named and what each family takes.

| | says |
|---|---|
| name | as `create_backbone` takes it; of transformers, a released model whose sizes were given to its model type |
| blocks × width | of the whole architecture; its width when tried, if that is another |
| pixels / patch | edges of the native image and of a patch |
| P | prefix tokens (class, registers) in front of the patches, which maps leave out |
| T | taps: the layers equal, bit for bit, what the model's own library gives, at the native size |
| S | other sizes: ✓ any multiple of the patch size, call by call; b: given when it is built, `image_size=` |
| ▭ | images that are not square, likewise |
| C | `torch.compile(encoder, fullgraph=True)` (`aot_eager`): the same tokens, to 1e-4 of the largest number |
| E | `torch.export.export(encoder, (images,))`, likewise |
| O | `torch.onnx.export(encoder, (images,), dynamo=True)`, run in onnxruntime, likewise |
| H | half precision, bfloat16 and float16: finite, and within a tenth of float32 |
| G | gradients: every parameter of the encoder gets one; with `freeze_backbone()` the fuser's alone |
| 4 | images of four channels |

The encoder is the backbone with `mmfuser`, on images of 8×8 patches where the model can be built for them. Hierarchical
models have one block a stage, of which layers 1, 2 and 3 are tapped, and `concat` (`resize="bilinear"`, a linear layer)
where the maps differ in width.
"""
_FUSERS = """## Fusers

All that layerfuse has, with {layers} maps of {channels:,} channels on a grid of {grid}; `text_gated` reads a
text embedding of 4,096 numbers. [Fusers](fusers.md) has formulas, sources, and the layers that each source taps.

| column | says |
|---|---|
| parameters, FLOPs | as `fuser.cost` counts them, per image |
| tokens | that come out, × channels; one image was fused into them |
| maps | takes any number of them, or from how many |
| grids, widths | takes maps of several grids, of several widths |
| text | reads a condition, and its tokens change with it |
| AnyRes | tokens of [tiles](data.md) lie on a grid, so that LLaVA puts them together as one picture |
| ONNX | behind a small backbone, exported and compared in onnxruntime |
"""
_BACKBONE_TITLES = {
    "blocks": "blocks × width",
    "pixels": "pixels / patch",
    "prefix": "P",
    "taps": "T",
    "size": "S",
    "non-square": "▭",
    "compile": "C",
    "export": "E",
    "ONNX": "O",
    "half": "H",
    "gradients": "G",
    "channels": "4",
}
_FUSER_TITLES = {
    name: name for name in ("parameters", "FLOPs", "tokens", "maps", "grids", "widths", "text", "AnyRes", "ONNX")
}


class _Notes:
    """Sentences under a table, each once, with the number by which its cells name it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def symbol(self, cell: Outcome) -> str:
        """Return what stands in a cell, with the number of its note."""
        text = _SYMBOLS.get(cell.value, cell.value).replace(" ", _NO_BREAK)
        if not cell.note:
            return text
        note = _ONE_SIZE.sub("", cell.note)
        if note not in self.texts:
            self.texts.append(note)
        return f"{text}<sup>{self.texts.index(note) + 1}</sup>"

    def lines(self) -> list[str]:
        """Return the list under the table."""
        if not self.texts:
            return []
        return ["", *(f"{number}. {_plain(text)}" for number, text in enumerate(self.texts, 1))]


def model_page(data: TableData) -> str:
    """Return the page's text."""
    versions = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    backbones = {row.key: row for row in data.rows if row.table == "backbones"}
    lines = [_HEAD.format(versions=versions, count=len(backbones))]
    for group in dict.fromkeys(row.group for row in BACKBONE_ROWS):
        rows = [backbones[row.key] for row in BACKBONE_ROWS if row.group == group and row.key in backbones]
        if rows:
            lines += [f"### {group}", "", *_table(_BACKBONE_TITLES, rows), ""]
    lines.append(_FUSERS.format(layers=NUM_LAYERS, channels=CHANNELS, grid="×".join(map(str, GRID))))
    lines += _table(_FUSER_TITLES, [row for row in data.rows if row.table == "fusers"])
    return "\n".join(lines) + "\n"


def _table(titles: Mapping[str, str], rows: Iterable[TriedRow]) -> list[str]:
    notes = _Notes()
    lines = [f"| | {' | '.join(titles.values())} |", "|---" * (len(titles) + 1) + "|"]
    for row in rows:
        cells = [notes.symbol(_shown(row, column)) for column in titles]
        lines.append(f"| {_title(row.key)} | {' | '.join(cells)} |")
    return [*lines, *notes.lines()]


def _shown(row: TriedRow, column: str) -> Outcome:
    cell = row.cells.get(column, Outcome("?"))
    if row.table == "fusers":
        # One sentence for all fusers that say the same.
        return Outcome(cell.value, re.sub(r"^(the )?fuser '\w+' ", "it ", cell.note))
    if column == "blocks" and row.cells["width"].value != "full":
        return Outcome(f"{cell.value} → {row.cells['width'].value}", cell.note)
    if column == "pixels":
        return Outcome(f"{cell.value} / {row.cells['patch'].value}", cell.note)
    return cell


def _title(key: str) -> str:
    name, _, option = key.partition(", ")
    return f"`{name}`" + (f", `{option}`" if option else "")


def _plain(text: str) -> str:
    """Keep a sentence from being read as HTML or as a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
