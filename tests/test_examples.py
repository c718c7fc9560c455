"""Every example runs, offline, in a process of its own, and prints what its text promises."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from layerfuse import FUSERS, Backbone
from tests.run_support import run_ready_python
from tests.source_support import ROOT

EXAMPLES = ROOT / "examples"

# File name -> (arguments for a quick run, what it must print).
RUNS: dict[str, tuple[list[str], list[str]]] = {
    "tap_layers.py": (["--layers", "2", "0", "-2"], ["layer 2: map (2, 196, 192)", "11 of 12 blocks; same maps: True"]),
    "fuse_in_ten_lines.py": ([], ["image (1, 3, 224, 224) -> tokens (1, 196, 192)", "FuserCost("]),
    # The published size of MMFuser at LLaVA-1.5's width.
    "compare_fusers.py": (
        ["--time"],
        ["mmfuser               5,190,592     576      1024", "select                        0", "text_gated"],
    ),
    "find_anomalies.py": ([], ["channels: (1024, 384)", "planted at row 5, column 2; most unlike: row 5, column 2"]),
    "segment_with_smp.py": (
        ["--steps", "1"],
        ["maps of [(3, 64, 64), (0, 32, 32), (64, 16, 16), (64, 8, 8)", "step 1: loss ", "pictures that are right: "],
    ),
    "detect_with_torchvision.py": (
        ["--steps", "1"],
        ["'0': (64, 24, 24)", "'pool': (64, 2, 2)", "step 1: loss ", "boxes found in a new picture: "],
    ),
    "train_tiny_llava.py": (
        ["--output", "out", "--num-train", "16", "--steps", "1", "1"],
        ["reloaded FusedLlavaForConditionalGeneration with fuser mmfuser", "answered: "],
    ),
    "use_in_your_project.py": ([], ["it fell: True", "same after loading: True"]),
    "write_a_backbone.py": (
        [],
        ["layers (3, 5) tokens 16 grid (4, 4)", "same after loading: True", "tapped (1, 2) of 4 blocks"],
    ),
    "write_a_fuser.py": ([], ["tokens (1, 196, 192)", "same after loading: True"]),
    "write_a_task.py": (
        ["--data", "clocks"],
        ["faults: none", "a model that always says 3:33: {'accuracy': 0.0, 'close': 0.25}"],
    ),
}


# It needs VLMEvalKit, of which tests/integrations/llava/harness has a stand-in.
RUN_ELSEWHERE = {"vlmevalkit_adapter.py"}


def test_every_example_has_a_run() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted({*RUNS, *RUN_ELSEWHERE})


@pytest.mark.parametrize("name", sorted(RUNS))
def test_example_prints_what_it_promises(name: str, tmp_path: Path) -> None:
    arguments, expected = RUNS[name]
    output = run_ready_python(str(EXAMPLES / name), *arguments, folder=tmp_path)
    assert [text for text in expected if text not in output] == [], output


def test_the_backbone_to_copy_needs_public_names_only() -> None:
    tree = ast.parse((EXAMPLES / "write_a_backbone.py").read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name for name in names if name.startswith("_")} == {"__init__"}
    assert sorted(Backbone.__abstractmethods__) == ["from_name", "rebuild"]


def test_the_fuser_to_copy_starts_alike_however_it_was_built() -> None:
    spec = importlib.util.spec_from_file_location("write_a_fuser", EXAMPLES / "write_a_fuser.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(example)
        with torch.device("meta"):
            fuser = example.GatedSum(8, 3, bias=-2.5)
        fuser.to_empty(device="cpu")
        torch.manual_seed(0)
        fuser.reset_parameters()
        assert torch.equal(fuser.gates.bias, torch.full((2,), -2.5))
        assert fuser.gates.weight.isfinite().all()
    finally:
        del FUSERS._entries["gated_sum"]
