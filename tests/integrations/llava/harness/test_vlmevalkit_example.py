"""The example's adapter in a stand-in of VLMEvalKit: its table of models, its base class, its `run.py`."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from integrations.llava.inference.predictor import load_predictor
from tests.integrations.llava.inference.answering_parts import save_run
from tests.run_support import run_python

BASE = """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def use_custom_prompt(self, dataset):
        return False

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)
"""
RUN = """
import json, sys
from vlmeval.config import supported_VLM
assert sys.argv[1:] == ["--data", "MMBench_DEV_EN", "--model", "layerfuse_llava"], sys.argv
model = supported_VLM[sys.argv[-1]]()
messages = json.load(open("messages.json"))
print("SAID" + json.dumps([model.generate(message=own, dataset="MMBench_DEV_EN") for own in messages]))
"""


def test_messages_get_the_answers_of_our_own_loop(
    backbone_folder: Path, pictures: list[Image.Image], root: Path, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", backbone_folder, positions=1024)
    example = root / "examples" / "vlmevalkit_adapter.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40
    package = tmp_path / "vlmeval"
    (package / "vlm").mkdir(parents=True)
    for name, source in (("__init__", ""), ("config", "supported_VLM = {}"), ("vlm/__init__", ""), ("vlm/base", BASE)):
        (package / f"{name}.py").write_text(source)
    (tmp_path / "run.py").write_text(RUN)
    for index in range(2):
        pictures[index].save(tmp_path / f"{index}.png")
    images = [{"type": "image", "value": f"{index}.png"} for index in range(2)]
    words = {"type": "text", "value": "What number is it?"}
    (tmp_path / "messages.json").write_text(json.dumps([[images[0], words], [words], [images[0], words, images[1]]]))
    path = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = sys.argv[1:]; "
    started = path + f"runpy.run_path({str(example)!r}, run_name='__main__')"
    told = ["--data", "MMBench_DEV_EN", "--model", "layerfuse_llava"]
    output = run_python("-c", started, "example", str(run), *told, folder=tmp_path)
    tagged = "<image>\nWhat number is it?\n<image>"
    prompts = ["What number is it?", "What number is it?", tagged]
    expected = load_predictor(run)([pictures[0], None, pictures[:2]], prompts, max_new_tokens=512)
    assert json.loads(output.partition("SAID")[2]) == expected
